"""Text from the swarm, token by token: `transformers`' own generation in a thread, an async iterator in front."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import outcome
import torch
import trio
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from petals.models.generation import ChainCache, InferenceSession
from petals.peer.client.chain import RemoteChainSession
from petals.peer.client.model_client import ClientOptions, ModelClient
from petals.peer.client.routing import RouteChoice
from petals.peer.client.session import HopTrace
from petals.peer.client.twins import Streamer
from petals.protocols.errors import UserError

if TYPE_CHECKING:
    from trio_typing import TaskStatus

LOOKAHEAD = 4
"""Tokens generated before the first of them is taken; then the generation waits for its reader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """What `transformers.generate` is asked for. Without temperature, top_k, top_p or seed the likeliest token wins."""

    max_new_tokens: int = 64
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    max_length: int | None = None
    """Room of the session in tokens, prompt included; None: just what is needed."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError("max_new_tokens must be at least 1")
        if self.temperature is not None and not self.temperature > 0:
            raise UserError("temperature must be above 0; leave it out to take the likeliest token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError("top_p must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise UserError("top_k must be at least 1")

    @property
    def samples(self) -> bool:
        return any(each is not None for each in (self.temperature, self.top_k, self.top_p, self.seed))

    def as_arguments(self) -> dict[str, Any]:
        """For `transformers.generate`."""
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.samples}
        if self.samples:  # else the library warns about settings that have no effect
            asked = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            arguments |= {name: value for name, value in asked.items() if value is not None}
        return arguments


@dataclass(frozen=True, slots=True)
class Token:
    """One step of a generation: its id, and what text it completes (empty in the middle of a character)."""

    id: int
    text: str


@dataclass(slots=True)
class Seconds:
    """Where a generation's time went."""

    prepare: float = 0.0
    """Embeddings and head loaded, prompt tokenised."""
    first_token: float = 0.0
    """Session opened, prompt computed, first token chosen."""
    decode: float = 0.0
    """All tokens after the first."""


@dataclass(eq=False)
class TokenStream:
    """An async iterator over tokens. Leaving its context, cancelling or dropping it ends the generation at once."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    """Everything generated so far, without the prompt."""
    seconds: Seconds = field(default_factory=Seconds)
    route: tuple[HopTrace, ...] = ()
    """The servers of the last step and where its time went."""
    choice: RouteChoice | None = None
    """Why the session was opened with the route it was."""
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    _ended: trio.Event = field(default_factory=trio.Event)
    _error: BaseException | None = None

    def __post_init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Token](LOOKAHEAD)

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed, the first token left out; 0 where there was only one."""
        return (len(self.token_ids) - 1) / self.seconds.decode if self.seconds.decode else 0.0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            if self._error is not None:
                raise self._error from None
            raise StopAsyncIteration from None
        except trio.Cancelled:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """End the generation; returns when every server has been told."""
        self._scope.cancel()
        with trio.CancelScope(shield=True):  # bounded: telling a server is
            await self._ended.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._ended.is_set():  # the loop over us was left with `break`
            self._scope.cancel()


class _Decoder:
    """Text of a growing list of tokens; holds back what is not yet a whole character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._emitted = ""

    def add(self, token: int) -> str:
        self._ids.append(token)
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if text.endswith("\ufffd"):
            return ""
        fresh, self._emitted = text[len(self._emitted) :], text
        if text.endswith("\n"):  # a safe place to forget the past: decoding is quadratic otherwise
            self._ids, self._emitted = [token], str(self._tokenizer.decode([token], skip_special_tokens=True))
        return fresh


class _SeededDice(LogitsProcessor):
    """Gives one generation dice of its own.

    The library draws from torch's global generator, which all threads share. Between the last logits processor and
    the streamer's call nothing but that draw happens: for so long, and no longer, the global state is ours.
    """

    _lock = threading.Lock()

    def __init__(self, seed: int) -> None:
        self._state = torch.Generator().manual_seed(seed).get_state()
        self._others: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._lock.acquire()
        self._others = torch.get_rng_state()
        torch.set_rng_state(self._state)
        return scores

    def put_back(self) -> None:
        if self._others is not None:
            self._state = torch.get_rng_state()
            torch.set_rng_state(self._others)
            self._others = None
            self._lock.release()


async def run_generation(
    client: ModelClient,
    prompt: str | Sequence[int],
    options: GenerationOptions,
    wanted: ClientOptions,
    *,
    task_status: TaskStatus[TokenStream] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Generate in a worker thread until done or cancelled. Started: the prompt is tokenised and the stream is there.

    Errors go to whoever iterates, not to the nursery this runs in.

    Raises:
        UserError: the prompt is empty, no tokens of this model, or does not fit the session; before `started`.
    """
    began = time.perf_counter()
    model, tokenizer = await client.language_model()
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
    if not all(0 <= each < model.get_input_embeddings().num_embeddings for each in ids):
        raise UserError(f"the prompt has token ids that {client.checkpoint.name} does not have")
    prompt_ids = torch.tensor([ids], dtype=torch.long)
    inputs = {"input_ids": prompt_ids, "attention_mask": torch.ones_like(prompt_ids)}
    length = prompt_ids.shape[1]
    needed = length + options.max_new_tokens
    room = options.max_length or needed
    if length == 0:
        raise UserError("the prompt is empty")
    if needed > room:
        raise UserError(f"a prompt of {length} tokens and {options.max_new_tokens} new ones do not fit into {room}")
    limit = getattr(client.checkpoint.config, "max_position_embeddings", None)
    if limit is not None and needed > limit:
        raise UserError(
            f"a prompt of {length} tokens and {options.max_new_tokens} new ones are more than the {limit} "
            f"that {client.checkpoint.name} can look back on; shorten the prompt or lower max_new_tokens"
        )
    stream = TokenStream(prompt_ids[0].tolist())
    stream.seconds.prepare = time.perf_counter() - began
    scope, ended = stream._scope, stream._ended
    session = InferenceSession(ChainCache(client.chain(wanted), room), room)
    work = _Work(model, tokenizer, inputs, options, session, stream)
    task_status.started(stream)
    del stream, task_status  # whoever iterates holds the last reference: dropping it ends us
    try:
        with scope:
            work.result = await client.portal.run_sync(outcome.capture, work.run, client.portal)
    finally:
        await work.finish()
        ended.set()


class _Work:
    """One generation: its thread half and the bookkeeping around it."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        inputs: Any,
        options: GenerationOptions,
        session: InferenceSession,
        stream: TokenStream,
    ) -> None:
        self.result: outcome.Outcome[None] | None = None
        self._model = model
        self._inputs = inputs
        self._options = options
        self._session = session
        self._decoder = _Decoder(tokenizer)
        self._stream = weakref.ref(stream)
        self._send = stream._send
        self._seconds = stream.seconds
        self._began = time.perf_counter()

    def run(self, portal: Any) -> None:
        """In the worker thread."""
        dice = _SeededDice(self._options.seed) if self._options.seed is not None else None

        def on_token(tokens: Tensor) -> None:
            if dice is not None:
                dice.put_back()
            portal.run(self._deliver, int(tokens.reshape(-1)[-1]))

        try:
            self._model.generate(
                self._inputs["input_ids"],
                attention_mask=self._inputs.get("attention_mask"),
                session=self._session,
                streamer=Streamer(on_token),
                logits_processor=LogitsProcessorList(() if dice is None else (dice,)),
                **self._options.as_arguments(),
            )
        finally:
            if dice is not None:
                dice.put_back()

    async def _deliver(self, token: int) -> None:
        now = time.perf_counter()
        text = self._decoder.add(token)
        stream = self._stream()
        if stream is None:  # our scope is being cancelled
            await trio.lowlevel.checkpoint()
            raise UserError("nobody is listening any more")
        if not stream.token_ids:
            self._seconds.first_token = now - self._began
        else:
            self._seconds.decode = now - self._began - self._seconds.first_token
        stream.token_ids.append(token)
        stream.text += text
        remote = self._session.cache.session
        if isinstance(remote, RemoteChainSession):
            stream.route = remote.trace
            stream.choice = remote.remote.choice
        del stream
        await self._send.send(Token(token, text))

    async def finish(self) -> None:
        """Give the caches back and tell whoever iterates."""
        remote = self._session.cache.session
        if isinstance(remote, RemoteChainSession):
            cut = isinstance(self.result, outcome.Error) or self.result is None
            await (remote.remote.reset() if cut else remote.remote.close())
        stream = self._stream()
        if stream is not None and isinstance(self.result, outcome.Error):
            stream._error = self.result.error
        self._send.close()
