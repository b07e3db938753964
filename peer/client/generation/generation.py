"""Text from the swarm, token by token: the decode loop in a worker thread, an async iterator in front."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import outcome
import torch
import trio
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from petals.models.client.decoding import Draw, Rules, criteria_of, decode, greedy, processors_of
from petals.models.client.drafts import DraftPolicy, TextDrafter
from petals.models.client.generation import ChainCache, InferenceSession, first_block_inputs
from petals.peer.client.constraints import TokenMask
from petals.peer.client.generation.generation_options import GenerationOptions, room_for
from petals.peer.client.generation.prompts import Prompt, end_tokens, tokenise
from petals.peer.client.generation.sampling import ChanceRecorder, Chances, Enough, Grammar, LogitBias, Penalties
from petals.peer.client.generation.text import Decoder, StopStrings
from petals.peer.client.model_client import ClientOptions, ModelClient, Prefix
from petals.peer.client.remote_chain import RemoteChain, RemoteChainSession
from petals.peer.client.routing.routing import RouteChoice
from petals.peer.client.session.session import HopTrace
from petals.protocols.errors import UserError
from petals.protocols.prefixes import PREFIX_TOKENS, prefix_names

if TYPE_CHECKING:
    from trio_typing import TaskStatus

LOOKAHEAD = 4
"""Tokens generated before the first of them is taken; then the generation waits for its reader."""


@dataclass(frozen=True, slots=True)
class Token:
    """One step of a generation: its id, and what text it completes.

    The text is empty in the middle of a character, and where a stop string may have begun.
    """

    id: int
    text: str
    chances: Chances | None = None
    """What the model thought of it; where `GenerationOptions.logprobs` asked."""


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
    reused_tokens: int = 0
    """Of the prompt; the servers had kept them from an earlier generation."""
    drafts: DraftPolicy = field(default_factory=DraftPolicy)
    """How many steps were taken, and how many guessed tokens were right."""
    choice: RouteChoice | None = None
    """Why the session was opened with the route it was."""
    finish_reason: Literal["stop", "length"] | None = None
    """Why it ended: the model's own end or a stop string, or `max_new_tokens`; None: it has not, or was cut off."""
    stopped_by: str | None = None
    """The stop string that ended it."""
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


async def run_generation(
    client: ModelClient,
    prompt: Prompt,
    options: GenerationOptions,
    wanted: ClientOptions,
    *,
    task_status: TaskStatus[TokenStream] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Generate in a worker thread until done or cancelled. Started: the prompt is tokenised and the stream is there.

    Errors go to whoever iterates, not to the nursery this runs in.

    Raises:
        UserError: the prompt is empty, not for this model, or does not fit the session; before `started`.
    """
    began = time.perf_counter()
    model, tokenizer = await client.language_model(wanted.head_quant)
    options.for_vocabulary(client.checkpoint)
    # Neither is waited for once nobody wants the answer: both are bounded, and touch nothing that others use.
    prompt_ids = await trio.to_thread.run_sync(
        partial(tokenise, tokenizer, prompt, client.checkpoint),
        abandon_on_cancel=True,  # type: ignore[call-arg]  # trio_typing knows its old name
    )
    new_tokens = room_for(len(prompt_ids), options, client.checkpoint)
    ends = [] if options.ignore_eos else end_tokens(model, tokenizer, prompt)
    mask, constraint = None, options.matching
    if constraint is not None:
        mask = await client.masks.make(constraint, tokenizer, ends, prompt_ids)
    ends = sorted({*ends, *options.stop_token_ids})
    room = options.max_length or len(prompt_ids) + new_tokens
    stream = TokenStream(prompt_ids)
    stream.seconds.prepare = time.perf_counter() - began
    scope, ended = stream._scope, stream._ended
    chain = client.chain(wanted)
    session = InferenceSession(ChainCache(chain, room), room)
    reused = chain if wanted.prefix_cache else None
    work = _Work(client, model, tokenizer, ends, new_tokens, options, session, stream, reused, mask)
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
        client: ModelClient,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        ends: list[int],
        new_tokens: int,
        options: GenerationOptions,
        session: InferenceSession,
        stream: TokenStream,
        reused: RemoteChain | None,
        mask: TokenMask | None,
    ) -> None:
        """
        Args:
            reused: the chain, whose servers may still have some of the prompt; None: they are not asked.
        """
        self.result: outcome.Outcome[None] | None = None
        self._client = client
        self._model = model
        self._prompt_ids = stream.prompt_ids
        self._new_tokens = new_tokens
        self._options = options
        self._session = session
        self._ends = ends
        self._mask = mask
        self._config = options.applied_to(model.generation_config)
        self._drafts = stream.drafts = DraftPolicy(mode=options.drafts)
        self._tokenizer = tokenizer
        self._decoder = Decoder(tokenizer, special=options.special_tokens)
        self._stop = StopStrings(options.stop)
        self._enough = Enough()
        self._recorder = ChanceRecorder(options.logprobs, tokenizer) if options.logprobs is not None else None
        self._stream = weakref.ref(stream)
        self._send = stream._send
        self._seconds = stream.seconds
        self._began = time.perf_counter()
        self._reused = reused
        self._reused_tokens = 0
        self._token_ids = list(stream.prompt_ids)
        """Of the whole sequence."""

    def run(self, portal: Any) -> None:
        """In the worker thread."""

        def on_token(token: int) -> None:
            if self._mask is not None and token not in self._ends:
                self._mask.advance(token)  # the next mask is computed beside the step
            portal.run(self._deliver, token, None if self._recorder is None else self._recorder.of(token))

        prompt = torch.tensor([self._prompt_ids])
        length = prompt.shape[1]
        if self._reused is not None:
            self._session.cache.session = self._begin_with_kept(self._reused, prompt)
        config, ends = self._config, self._ends
        processors = processors_of(
            config, prompt_length=length, max_length=length + self._new_tokens, ends=ends, more=self._processors()
        )
        if self._recorder is not None:  # first, so that it sees what the model said
            processors.insert(0, self._recorder)
        decode(
            self._model,
            self._session.cache,
            prompt,
            max_new_tokens=self._new_tokens,
            rules=Rules(
                processors,
                criteria_of(config, ends=ends, tokenizer=self._tokenizer, more=[self._enough]),
                Draw(self._options.seed) if self._options.samples else greedy,
            ),
            on_token=on_token,
            drafter=TextDrafter(self._drafts, time.perf_counter),
        )
        stream = self._stream()
        if stream is not None and stream.finish_reason is None:
            stream.finish_reason = "stop"  # by the settings' stop strings or time limit

    def _begin_with_kept(self, chain: RemoteChain, prompt: Tensor) -> RemoteChainSession:
        """A session that begins with what the servers have kept of the prompt; its last token is computed anyway."""
        names = tuple(prefix_names(self._prompt_ids[:-1]))
        inputs = partial(first_block_inputs, self._model, prompt[:, : len(names) * PREFIX_TOKENS])
        prefix = Prefix(names, lambda: inputs().cpu())
        session = chain.open_session(batch_size=1, max_length=self._session.max_length, prefix=prefix)
        self._reused_tokens = session.position
        return session

    def _processors(self) -> list[LogitsProcessor]:
        """Those of OpenAI and other servers; the grammar's comes last, before a draw is narrowed down."""
        made: list[LogitsProcessor] = []
        presence, frequency = self._options.presence_penalty, self._options.frequency_penalty
        if presence or frequency:
            made.append(Penalties(len(self._prompt_ids), presence=presence, frequency=frequency))
        if self._options.logit_bias:
            made.append(LogitBias(self._options.logit_bias))
        if self._mask is not None:
            made.append(Grammar(self._mask))
        return made

    async def _deliver(self, token: int, chances: Chances | None) -> None:
        now = time.perf_counter()
        self._token_ids.append(token)
        stream = self._stream()
        if stream is None:  # our scope is being cancelled
            await trio.lowlevel.checkpoint()
            raise UserError("nobody is listening any more")
        ended = token in self._ends
        last = ended or len(stream.token_ids) + 1 == self._new_tokens
        text = self._decoder.add(token, last=last, silent=ended)
        if len(stream.token_ids) + 1 >= self._options.min_new_tokens:
            text = self._stop.add(text, last=last)
        self._enough.reached = self._stop.found
        if ended or self._stop.found:
            stream.finish_reason, stream.stopped_by = "stop", self._stop.which
        elif last:
            stream.finish_reason = "length"
        if not stream.token_ids:
            self._seconds.first_token = now - self._began
        else:
            self._seconds.decode = now - self._began - self._seconds.first_token
        stream.token_ids.append(token)
        stream.text += text
        stream.reused_tokens = self._reused_tokens
        remote = self._session.cache.session
        if isinstance(remote, RemoteChainSession):
            stream.route = remote.trace
            stream.choice = remote.remote.choice
        del stream
        await self._send.send(Token(token, text, chances))

    async def finish(self) -> None:
        """Give the caches back and tell whoever iterates."""
        remote = self._session.cache.session
        if isinstance(remote, RemoteChainSession):
            cut = isinstance(self.result, outcome.Error) or self.result is None
            if cut:
                await remote.remote.reset()
            else:
                known = self._token_ids[: remote.position] if self._reused is not None else []
                await self._client.leave(remote.remote, prefix_names(known))
        stream = self._stream()
        if stream is not None and isinstance(self.result, outcome.Error):
            stream._error = self.result.error
        self._send.close()
