"""What a distributed model offers a trio program: the same calls, awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import outcome
import trio
from torch import Tensor

from petals.models.client.generation import InferenceSession
from petals.peer.base.concurrency import shielded_for
from petals.peer.base.portal import Portal

T = TypeVar("T")

CLOSE_S = 5.0
"""How long leaving a session may take; its hops bound their own goodbyes."""


class AsyncTwins:
    """Mixed into every model that is opened over a peer.

    torch and `transformers` are synchronous: the work runs in a worker thread, which is unwound when the task that
    waits for it is cancelled.
    """

    portal: Portal

    async def run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Await any torch code that uses this model: `await model.run(loss.backward)`."""
        return await self.portal.run_sync(partial(function, *args, **kwargs))

    async def agenerate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate`, awaited."""
        return await self.run(self.generate, *args, **kwargs)  # type: ignore[attr-defined]

    async def aforward(self, *args: Any, **kwargs: Any) -> Any:
        """`model(...)`, awaited; gradients flow as ever: `await model.run(output.loss.backward)`."""
        return await self.run(self, *args, **kwargs)  # type: ignore[arg-type]

    @asynccontextmanager
    async def astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[trio.MemoryReceiveChannel[Tensor]]:
        """`generate`, token by token: `async with model.astream(ids) as tokens: async for token in tokens`.

        Each item is (batch,) int64. Leaving the context ends the generation.
        """
        send, receive = trio.open_memory_channel[Tensor](0)
        streamer = Streamer(lambda tokens: self.portal.run(send.send, tokens.clone()))
        result: outcome.Outcome[Any] | None = None

        async def work() -> None:
            nonlocal result
            async with send:
                result = await outcome.acapture(partial(self.agenerate, *args, streamer=streamer, **kwargs))

        async with trio.open_nursery() as nursery, receive:
            nursery.start_soon(work)
            yield receive
            nursery.cancel_scope.cancel()
        if isinstance(result, outcome.Error) and not isinstance(result.error, trio.Cancelled):
            result.unwrap()

    @asynccontextmanager
    async def ainference_session(self, *, max_length: int) -> AsyncIterator[InferenceSession]:
        """`inference_session`, for `agenerate` and `run`; its caches are given back on the way out."""
        session: InferenceSession = self.inference_session(max_length=max_length)  # type: ignore[attr-defined]
        with self.use_session(session):  # type: ignore[attr-defined]
            try:
                yield session
            finally:
                with shielded_for(CLOSE_S):
                    await self.portal.run_sync(session.close)


class Streamer:
    """Called by `transformers` with the prompt and then with each new token of every row, (batch,) int64."""

    def __init__(self, on_tokens: Callable[[Tensor], object]) -> None:
        self._on_tokens = on_tokens
        self._seen_prompt = False

    def put(self, value: Tensor) -> None:
        if self._seen_prompt:
            self._on_tokens(value)
        self._seen_prompt = True

    def end(self) -> None:
        pass
