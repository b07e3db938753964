"""The same peer for programs without an event loop: a background thread runs it, a portal leads in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import outcome
import trio

from petals.peer.base.config import PeerConfig
from petals.peer.client.generation.generation import Token, TokenStream
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.client.model_client import ClientOptions
from petals.peer.node import Peer, open_peer


def connect(*initial_peers: str, progress: Callable[[str], None] | None = None, **settings: Any) -> SyncPeer:
    """A peer that joins the swarm of `initial_peers`; use it in a `with`.

    Args:
        settings: fields of `PeerConfig`, such as `model="..."` or `serve=ServeConfig(...)`.
    """
    return SyncPeer(PeerConfig(initial_peers=initial_peers, **settings), progress=progress)


class SyncPeer:
    """A `Peer` in a thread of its own. A context manager: entering opens it, leaving ends it and the thread."""

    def __init__(self, config: PeerConfig, *, progress: Callable[[str], None] | None = None) -> None:
        self._config = config
        self._progress = progress
        self._opened = threading.Event()
        self._peer: Peer | None = None
        self._leave: trio.Event | None = None
        self._result: outcome.Outcome[None] | None = None
        self._thread = threading.Thread(target=self._run, name="petals-peer", daemon=True)

    @property
    def peer(self) -> Peer:
        """The peer itself; its async methods are called through `peer.portal.run`."""
        if self._peer is None:
            raise RuntimeError("the peer is not open: use it inside of `with`")
        return self._peer

    def generate(self, prompt: str, *, client: ClientOptions | None = None, **options: Any) -> Iterator[Token]:
        """Tokens as they come. Closing the iterator (or leaving the loop and dropping it) ends the generation.

        Args:
            options: fields of `GenerationOptions`.
        Raises:
            MissingBlocks, UserError: as `Peer.generate`.
        """
        run = self.peer.portal.run

        async def start() -> TokenStream:
            return await self.peer.generate(prompt, options=GenerationOptions(**options), client=client)

        async def next_token() -> Token | None:
            try:
                return await stream.__anext__()
            except StopAsyncIteration:
                return None

        stream = run(start)
        try:
            while (token := run(next_token)) is not None:
                yield token
        finally:
            run(stream.aclose)

    def tokenizer(self, model: str | None = None) -> Any:
        """The model's own tokenizer."""
        return self.peer.portal.run(self.peer.checkpoint, model).tokenizer()

    def __enter__(self) -> Self:
        self._thread.start()
        self._opened.wait()
        if self._peer is None:
            self._thread.join()
            assert self._result is not None
            self._result.unwrap()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._leave is not None
        trio.from_thread.run_sync(self._leave.set, trio_token=self.peer.portal.token)
        self._thread.join()
        assert self._result is not None
        if exc is None:
            self._result.unwrap()

    def _run(self) -> None:
        self._result = outcome.capture(trio.run, self._main)
        self._opened.set()

    async def _main(self) -> None:
        async with open_peer(self._config, progress=self._progress) as peer:
            self._leave = trio.Event()
            self._peer = peer
            self._opened.set()
            await self._leave.wait()
