"""From a request that was understood to its answer: generations side by side, whole or as a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace

import trio
from starlette.types import Receive, Scope, Send

from petals.gateway.asgi import ByteStream, ClientGone, unless_gone
from petals.gateway.dialect import Dialect
from petals.gateway.errors import ApiError, as_api_error
from petals.gateway.metrics import Meter
from petals.gateway.request_parser import Wanted
from petals.gateway.waiting import WaitingLine
from petals.gateway.writing import Choice, Head, Writer
from petals.peer.client.constraints import ConstraintError
from petals.peer.client.generation.generation import Token, TokenStream
from petals.peer.client.generation.prompts import tokenise
from petals.peer.client.generation.scoring import Scores, score
from petals.peer.client.model_client import ClientOptions
from petals.peer.node import Peer

WriterMaker = Callable[[Head, Wanted], Writer]


@dataclass(frozen=True, slots=True)
class Offered:
    """A model that can be asked for."""

    name: str
    """As clients spell it."""
    argument: str | None
    """As the peer knows it."""
    digest: str
    adapter: str | None = None
    """A LoRA adapter that servers host, and apply."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Whose request it is: keys take turns, and the connections of a key."""

    key: Hashable = None
    connection: Hashable = None
    limit: int | None = None
    """Answers of this key at once."""


class Answerer:
    """Runs generations for requests, no more than `max_answers` at once."""

    def __init__(self, peer: Peer, meter: Meter, line: WaitingLine) -> None:
        self.running: list[tuple[str, TokenStream]] = []
        """Model and generation of every answer that is being generated."""
        self.line = line
        self._peer = peer
        self._meter = meter
        self._dialects: dict[str, Dialect] = {}

    async def whole(
        self, wanted: Wanted, model: Offered, make: WriterMaker, asker: Asker, receive: Receive
    ) -> dict[str, object]:
        """The answer in one piece.

        Raises:
            ApiError. ClientGone: nobody waits; everything has been given back.
        """

        async def answer() -> dict[str, object]:
            async with self.turn(wanted.n * len(wanted.prompts), asker), self._open(wanted, model) as choices:
                await _run(choices, _ignore)
                return make(_head(wanted, model), wanted).whole(choices)

        return await unless_gone(receive, answer)

    def streamed(
        self, wanted: Wanted, model: Offered, make: WriterMaker, asker: Asker
    ) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        """The answer as an ASGI application of its own; errors before the first token are raised."""

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            writer = make(_head(wanted, model), wanted)
            out = ByteStream(send, writer.content_type)

            async def answer() -> None:
                async with self.turn(wanted.n * len(wanted.prompts), asker):
                    await self._stream(wanted, model, writer, out)

            try:
                await unless_gone(receive, answer)
            except ClientGone:
                return
            except ApiError as error:
                if not out.started:
                    raise
                await out.send(writer.failed(error))
            await out.end()

        return respond

    def turn(self, count: int, asker: Asker) -> AbstractAsyncContextManager[None]:
        """Room for `count` answers, or other work of that size."""
        return self.line.admitted(count, key=asker.key, connection=asker.connection, limit=asker.limit)

    async def _stream(self, wanted: Wanted, model: Offered, writer: Writer, out: ByteStream) -> None:
        opened: set[int] = set()
        route: list[object] = []

        async with self._open(wanted, model) as choices:

            async def pass_on(choice: Choice, token: Token | None) -> None:
                if not opened:
                    await out.send(writer.begin())
                if choice.index not in opened:
                    opened.add(choice.index)
                    await out.send(writer.opening(choice))
                stream = choice.stream
                if wanted.include_route and choice.index == 0 and stream is not None:
                    hops = [(hop.peer_id, hop.blocks) for hop in stream.route]
                    if token is None or hops != route:
                        route[:] = hops
                        await out.send(writer.route(stream))
                if token is not None:
                    await out.send(writer.step(choice, choice.add(token), token.chances))
                    return
                if rest := choice.end():
                    await out.send(writer.step(choice, rest, None))
                await out.send(writer.closing(choice))

            await _run(choices, pass_on)
            await out.send(writer.end(choices))

    @asynccontextmanager
    async def _open(self, wanted: Wanted, model: Offered) -> AsyncIterator[list[Choice]]:
        """One choice per answer; when the context is left, every server has been told."""
        choices: list[Choice] = []
        try:
            dialect = await self._dialect(model)
            wanted = dialect.prepared(wanted)
            await self._begin(wanted, model, dialect, choices)
            yield choices
        except ApiError:
            raise
        except ConstraintError as error:
            raise ApiError(400, str(error), param=wanted.constraint_field) from error
        except Exception as error:
            raise as_api_error(error) from error
        finally:
            streams = [each.stream for each in choices if each.stream is not None]
            with trio.CancelScope(shield=True):  # each is bounded by itself
                async with trio.open_nursery() as nursery:
                    for stream in streams:
                        nursery.start_soon(stream.aclose)
            self.running = [each for each in self.running if each[1] not in streams]
            self._meter.generated(model.name, choices)

    async def _begin(self, wanted: Wanted, model: Offered, dialect: Dialect, choices: list[Choice]) -> None:
        asked = self.options_of(model)
        scores: Scores | None = None
        for index, (prompt, options) in enumerate(wanted.choices()):
            if wanted.score is not None and index % wanted.n == 0:
                client = await self._peer.client(model.argument)
                await client.ready(asked)
                scores = await score(client, prompt, asked, top=wanted.score)
            stream = None
            if wanted.generates:
                stream = await self._peer.generate(prompt, model=model.argument, options=options, client=asked)
                self.running.append((model.name, stream))
            if stream is not None:
                ids = stream.prompt_ids
            elif scores is not None:
                ids = scores.ids
            else:
                client = await self._peer.client(model.argument)
                ids = await trio.to_thread.run_sync(tokenise, dialect.tokenizer, prompt, client.checkpoint)
            choice = Choice(index, stream, len(ids), dialect.parser(wanted, ids))
            choices.append(choice)
            if wanted.echo:
                choice.echoed_tokens = scores.tokens if scores is not None else ()
                choice.echoed = prompt if isinstance(prompt, str) else str(dialect.tokenizer.decode(ids))

    def options_of(self, model: Offered) -> ClientOptions:
        """How the swarm is asked for a model."""
        if model.adapter is None:
            return self._peer.asking
        return replace(self._peer.asking, active_adapter=model.adapter)

    async def _dialect(self, model: Offered) -> Dialect:
        if model.digest not in self._dialects:
            client = await self._peer.client(model.argument)
            _, tokenizer = await client.language_model(self._peer.asking.head_quant)
            self._dialects[model.digest] = Dialect.of(tokenizer)
        return self._dialects[model.digest]


async def _run(choices: Sequence[Choice], on_token: Callable[[Choice, Token | None], Awaitable[None]]) -> None:
    """Every token of every choice as it comes, None at the end of each. The first error ends them all."""
    failures: list[Exception] = []

    async def follow(choice: Choice) -> None:
        try:
            if choice.stream is not None:
                async for token in choice.stream:
                    await on_token(choice, token)
            await on_token(choice, None)
        except Exception as error:  # kept, not handled: raised below, outside of the nursery's group
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for choice in choices:
            nursery.start_soon(follow, choice)
    if failures:
        raise failures[0]


async def _ignore(choice: Choice, token: Token | None) -> None:
    """Kept for an answer in one piece."""
    if token is None:
        choice.end()
    else:
        choice.add(token)


def _head(wanted: Wanted, model: Offered) -> Head:
    return Head(
        id=secrets.token_hex(12),
        created=int(time.time()),
        model=model.name,
        fingerprint=f"fp_{model.digest[:12]}",
        n=wanted.n,
    )
