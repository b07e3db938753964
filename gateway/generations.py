"""From a request that was understood to its answer: generations side by side, whole or as a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass

import trio
from starlette.types import Receive, Scope, Send

from petals.gateway.asgi import ClientGone, EventStream, unless_gone
from petals.gateway.errors import ApiError, as_api_error
from petals.gateway.limits import Allowance
from petals.gateway.metrics import Meter
from petals.gateway.request_parser import Wanted
from petals.gateway.responses import Head, route_of
from petals.peer.client.generation.generation import Token, TokenStream
from petals.peer.client.generation.sampling import Chances
from petals.peer.node import Peer


@dataclass(frozen=True, slots=True)
class Offered:
    """A model that can be asked for."""

    name: str
    """As clients spell it."""
    argument: str | None
    """As the peer knows it."""
    digest: str


class Answerer:
    """Runs generations for requests, no more than `max_answers` at once."""

    def __init__(self, peer: Peer, meter: Meter, max_answers: int) -> None:
        self.active = 0
        self.running: list[tuple[str, TokenStream]] = []
        """Model and generation of every answer that is being generated."""
        self._peer = peer
        self._meter = meter
        self._max_answers = max_answers

    async def whole(
        self, wanted: Wanted, model: Offered, allowance: Allowance | None, receive: Receive
    ) -> dict[str, object]:
        """The answer in one piece.

        Raises:
            ApiError. ClientGone: nobody waits; everything has been given back.
        """
        with self._slots(wanted, allowance):
            return await unless_gone(receive, lambda: self._whole(wanted, model))

    async def _whole(self, wanted: Wanted, model: Offered) -> dict[str, object]:
        async with self._open(wanted, model) as streams:
            chances: list[list[Chances]] = [[] for _ in streams]

            async def keep(index: int, token: Token | None) -> None:
                if token is not None and token.chances is not None:
                    chances[index].append(token.chances)

            await _run(streams, keep)
            echoed = [wanted.echoed(index) for index in range(len(streams))]
            return _head(wanted, model).whole(streams, chances, echoed)

    def streamed(
        self, wanted: Wanted, model: Offered, allowance: Allowance | None
    ) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        """The answer as an ASGI application of its own; errors before the first token are raised."""

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            events = EventStream(send)
            with self._slots(wanted, allowance):
                try:
                    await unless_gone(receive, lambda: self._stream(wanted, model, events))
                except ClientGone:
                    return
                except ApiError as error:
                    if not events.started:
                        raise
                    await events.emit(error.body())
                await events.end()

        return respond

    async def _stream(self, wanted: Wanted, model: Offered, events: EventStream) -> None:
        head = _head(wanted, model)
        unused = {"usage": None} if wanted.include_usage else {}
        positions: dict[int, int] = {}
        route: list[object] = []

        async with self._open(wanted, model) as streams:

            async def pass_on(index: int, token: Token | None) -> None:
                if index not in positions:
                    positions[index] = 0
                    if wanted.chat or wanted.echo:
                        await events.emit(head.opening(index, wanted.echoed(index)) | unused)
                if wanted.include_route and index == 0:
                    hops = [(hop.peer_id, hop.blocks) for hop in streams[0].route]
                    if token is None or hops != route:
                        route[:] = hops
                        await events.emit(head.extra(petals=route_of(streams[0])) | unused)
                if token is None:
                    await events.emit(head.closing(index, streams[index]) | unused)
                elif token.text or token.chances is not None:
                    await events.emit(head.piece(index, token, positions[index]) | unused)
                    positions[index] += len(token.text)

            await _run(streams, pass_on)
            if wanted.include_usage:
                await events.emit(head.extra(usage=head.usage(streams)))
            await events.emit("[DONE]")

    @contextmanager
    def _slots(self, wanted: Wanted, allowance: Allowance | None) -> Iterator[None]:
        count = wanted.n * len(wanted.prompts)
        if self.active + count > self._max_answers:
            raise ApiError(
                429,
                f"this peer is answering {self.active} of at most {self._max_answers} at once; ask again soon",
                code="rate_limit_exceeded",
                retry_after_s=1.0,
            )
        with nullcontext() if allowance is None else allowance.answering(count):
            self.active += count
            try:
                yield
            finally:
                self.active -= count

    @asynccontextmanager
    async def _open(self, wanted: Wanted, model: Offered) -> AsyncIterator[list[TokenStream]]:
        """One stream per choice; when the context is left, every server has been told."""
        streams: list[TokenStream] = []
        try:
            for prompt, options in wanted.choices():
                streams.append(await self._peer.generate(prompt, model=model.argument, options=options))
                self.running.append((model.name, streams[-1]))
            yield streams
        except ApiError:
            raise
        except Exception as error:
            raise as_api_error(error) from error
        finally:
            with trio.CancelScope(shield=True):  # each is bounded by itself
                async with trio.open_nursery() as nursery:
                    for stream in streams:
                        nursery.start_soon(stream.aclose)
            self.running = [each for each in self.running if each[1] not in streams]
            self._meter.generated(streams)


async def _run(streams: Sequence[TokenStream], on_token: Callable[[int, Token | None], Awaitable[None]]) -> None:
    """Every token of every stream as it comes, None at the end of each. The first error ends them all."""
    failures: list[Exception] = []

    async def follow(index: int, stream: TokenStream) -> None:
        try:
            async for token in stream:
                await on_token(index, token)
            await on_token(index, None)
        except Exception as error:  # kept, not handled: raised below, outside of the nursery's group
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for index, stream in enumerate(streams):
            nursery.start_soon(follow, index, stream)
    if failures:
        raise failures[0]


def _head(wanted: Wanted, model: Offered) -> Head:
    return Head(
        id=("chatcmpl-" if wanted.chat else "cmpl-") + secrets.token_hex(12),
        created=int(time.time()),
        model=model.name,
        fingerprint=f"fp_{model.digest[:12]}",
        chat=wanted.chat,
        n=wanted.n,
    )
