"""Inference sessions: one accepted stream each; bytes -> protocol events -> lane -> bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import trio
from torch import Tensor

from petals.dht.directory import Signer
from petals.models.blocks.adapters import check_lora
from petals.models.blocks.block import BlockSpan
from petals.models.blocks.cache import SpanCache
from petals.peer.accounting.ledger import nobody_counts
from petals.peer.base.concurrency import together
from petals.peer.base.config import ServeConfig
from petals.peer.engine.admission import Admission
from petals.peer.engine.answer_signer import Notary
from petals.peer.engine.cache_budget import CacheBudget, Lease
from petals.peer.engine.lora_codec import decode_lora
from petals.peer.engine.prefix_cache import PrefixStore
from petals.peer.engine.push_inbox import Mailbox, Pushed
from petals.peer.engine.push_sender import Pusher
from petals.peer.engine.quotas import Rates
from petals.peer.engine.scheduler import Lane, Priority, Timed, Visitor
from petals.peer.engine.steps import StepWork, whole
from petals.peer.engine.stream_rules import (
    DECODE_TOKENS,
    PATIENCE_S,
    UNLEASED_BYTES,
    Adapter,
    Asker,
    Guard,
    Plan,
    Refused,
    parse,
)
from petals.peer.engine.throughput import Speedometer
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import RemoteProtocolError, SwarmError
from petals.protocols.inference import Conversation, step_payload
from petals.protocols.lora import lora_payload
from petals.protocols.prefixes import PREFIX_TOKENS
from petals.protocols.push import push_payload
from petals.protocols.receipts import block_tokens
from petals.protocols.stream import ByteStream
from petals.protocols.tensors import WIRE_DTYPES, check_header, decode_tensor, encode_tensor
from petals.protocols.types import ModelId, PeerId

FIRST_WORDS_S = 30.0
"""From a stream's beginning to what it asks for; only who holds a lease may be silent for longer."""


@dataclass(slots=True)
class _Session:
    cache: SpanCache
    adapter: Adapter
    mailbox: Mailbox
    visitor: Visitor
    lease: Lease
    notary: Notary | None = None
    """Where answers are signed."""
    plain: bool = True
    """Its cache is a function of its tokens and of what the opening says, of nothing else."""


class Sessions(Guard):
    """Answers `/petals/inference` and takes `/petals/push`."""

    def __init__(
        self,
        model: ModelId,
        span: BlockSpan,
        lane: Lane,
        budget: CacheBudget,
        config: ServeConfig,
        admission: Admission,
        rates: Rates,
        *,
        gave: Callable[[PeerId, int], None] = nobody_counts,
        charge: Callable[[PeerId, int], None] = nobody_counts,
        speed: Speedometer,
        pusher: Pusher,
        signer: Signer | None = None,
    ) -> None:
        super().__init__(model, span, lane, budget, config, admission, rates, gave=gave, charge=charge)
        self._speed = speed
        self._pusher = pusher
        self._signer = signer
        self._mailboxes: dict[bytes, Mailbox] = {}
        self.prefixes: PrefixStore | None = None
        if config.prefix_idle_s and not config.deterministic and span.cache_depends_on_tokens_only:
            self.prefixes = PrefixStore(budget, idle_s=config.prefix_idle_s, shared=config.share_prefixes)

    async def answer_inference(self, stream: ByteStream) -> None:
        """Serve one inference session until the client closes it, breaks a rule, or vanishes."""
        await self._guarded(stream, self._session, lambda error: pb.InferenceReply(error=error))

    async def answer_push(self, stream: ByteStream) -> None:
        """Take one push into the mailbox of its session. One that fits nowhere costs its sender the stream."""
        messages = Asker(stream)
        with self._count(messages), messages.within(self.config.payload_s):
            data = await messages.read_message()
            push = parse(pb.Push(), data or b"")
            mailbox = self._mailboxes.get(push.session_id)
            if mailbox is None:
                await messages.reset()
                return
            size = push_payload(push, mailbox.opening.batch_size, mailbox.opening.max_length, self.span.hidden_size)
            lease = await self._hold(stream.remote_peer, size, 0.0)  # the sender's, until its step has begun
            try:
                pushed = Pushed(stream.remote_peer, push, await messages.read_payload(size), lease)
                if self._mailboxes.get(push.session_id) is mailbox:
                    mailbox.put(pushed)
                    return
            except BaseException:
                lease.release()
                raise
            lease.release()  # its session has ended meanwhile

    async def _session(self, messages: Asker) -> None:
        conversation = Conversation()
        request = await self._next_request(messages, min(FIRST_WORDS_S, self.config.session_idle_s))
        if request is None:
            return
        if conversation.request(request) == "close":
            return
        opening = request.open
        blocks = self._check_servable(opening)
        factors = lora_payload(opening.lora, blocks)
        nbytes = self.span.cache_bytes(blocks, opening.batch_size, opening.max_length) + self._lora_bytes(factors)
        if nbytes > self.budget.max_peer_bytes:
            raise Refused(pb.QUOTA, self._why_never(opening, blocks, nbytes))
        lease = await self._lease(messages.remote_peer, nbytes, opening.wait_ms / 1000)
        with lease, self._mailbox(opening) as mailbox:
            await self._turn(messages.remote_peer, 0, factors)
            adapter = await self._read_adapter(messages, opening, factors)
            cache = self.span.new_cache(blocks, opening.batch_size, opening.max_length)
            session = _Session(cache, adapter, mailbox, Visitor(), lease, plain=not factors)
            opened = pb.Opened(dtype=WIRE_DTYPES[self.span.dtype], cache_bytes=nbytes)
            if session.plain:
                opened.prefix_tokens = await self._begin(messages.remote_peer, cache, opening)
            if opening.sign and self._signer is not None:
                session.notary = Notary(self._signer, self.span, opening, adapter, opened)
            reply = pb.InferenceReply(opened=opened)
            conversation.reply(reply)
            await self._answer(messages, reply)
            while (request := await self._next_request(messages)) is not None:
                match conversation.request(request):
                    case "close":
                        await self._keep(messages.remote_peer, session, opening, request.close.prefixes)
                        return
                    case "supply":  # the push was faster
                        await self._read_payload(messages, [_hidden_of(request.supply)])
                    case _:
                        await self._step(messages, conversation, session, request.step)

    def _why_never(self, opening: pb.Open, blocks: range, nbytes: int) -> str:
        most, rows, tokens = self.budget.max_peer_bytes, opening.batch_size, opening.max_length
        per_token = self.span.cache_bytes(blocks, rows, tokens) / tokens
        asked = f"{tokens:,} tokens" if rows == 1 else f"{rows} rows of {tokens:,} tokens"
        share = "" if most == self.budget.total_bytes else " and --max_peer_share"
        return (
            f"{asked} over blocks {blocks.start}:{blocks.stop} need {nbytes / 1e6:,.1f} MB of KV cache, one peer may "
            f"hold {most / 1e6:,.1f} MB here: {int(most / per_token):,} tokens; ask for fewer, or have the server's "
            f"operator change --cache_mb{share}"
        )

    async def _begin(self, peer_id: PeerId, cache: SpanCache, opening: pb.Open) -> int:
        """Fill the cache with what is kept of its prefix; returns how many tokens that is."""
        if self.prefixes is None or opening.batch_size != 1:
            return 0
        owner = self.prefixes.owner(peer_id, cache.blocks, opening.adapter)
        found = self.prefixes.find(owner, opening.prefixes, cache.max_length)
        if found is None:
            return 0
        kept, tokens = found
        await self.lane.submit(Priority.PREFILL, partial(cache.copy_from, kept, tokens), peer_id=peer_id)
        return tokens

    async def _keep(self, peer_id: PeerId, session: _Session, opening: pb.Open, names: Sequence[bytes]) -> None:
        """Keep as much of the session's cache as has names."""
        cache = session.cache
        names = names[: cache.position // PREFIX_TOKENS]
        if self.prefixes is None or not names or not session.plain or opening.batch_size != 1:
            return
        kept = self.span.new_cache(cache.blocks, 1, len(names) * PREFIX_TOKENS)
        await self.lane.submit(Priority.PREFILL, partial(kept.copy_from, cache, kept.max_length), peer_id=peer_id)
        self.prefixes.add(self.prefixes.owner(peer_id, cache.blocks, opening.adapter), kept, names, session.lease)

    async def _read_adapter(self, messages: Asker, opening: pb.Open, factors: Plan) -> Adapter:
        lora = decode_lora(opening.lora, await self._read_payload(messages, factors))
        if lora is not None:
            check_lora(lora, self.span)
        return lora or opening.adapter or None

    async def _step(
        self,
        messages: Asker,
        conversation: Conversation,
        session: _Session,
        step: pb.Step,
    ) -> None:
        assert conversation.opening is not None
        opening = conversation.opening
        tokens = step.hidden.shape[1] * opening.batch_size
        if tokens > self.config.max_batch_tokens:
            raise Refused(pb.TOO_LONG, f"{tokens} tokens in one step, at most {self.config.max_batch_tokens}")
        self._check_answer(tokens)
        plan = step_payload(step, opening, self.span.hidden_size)
        await self._turn(messages.remote_peer, tokens, [*plan, _hidden_of(step)] if step.pushed_by else plan)
        with await self._hold_step(messages.remote_peer, tokens, plan):
            await self._served_step(messages, conversation, session, step, plan)

    async def _hold_step(self, peer_id: PeerId, tokens: int, plan: Plan) -> AbstractContextManager[object]:
        """Memory for a step's tensors as they come and as they are computed with, and for its answer."""
        received = sum(size for _, _, size in plan)
        nbytes = 2 * received + tokens * self.span.hidden_size * 4
        return nullcontext() if nbytes <= UNLEASED_BYTES else await self._hold(peer_id, nbytes, PATIENCE_S)

    async def _served_step(
        self, messages: Asker, conversation: Conversation, session: _Session, step: pb.Step, plan: Plan
    ) -> None:
        assert conversation.opening is not None
        opening = conversation.opening
        tensors = await self._read_payload(messages, plan)
        supplied = False
        if step.pushed_by:
            hidden, supplied = await self._pushed(messages, conversation, session.mailbox, step)
            if hidden is None:
                return
            tensors["hidden"] = hidden
        mask, hypo_ids = tensors.get("attention_mask"), tensors.get("hypo_ids")
        if hypo_ids is not None or "prompts" in tensors or not (mask is None or bool(mask.all())):
            session.plain = False
        if hypo_ids is not None and not bool(((hypo_ids >= 0) & (hypo_ids < opening.batch_size)).all()):
            raise RemoteProtocolError(f"hypo_ids outside 0:{opening.batch_size}")
        if session.notary is not None:  # before: a block may compute in place
            await session.notary.note(step.position, tensors)
        done = await self._compute(messages, session.visitor, session.cache, step.position, tensors, session.adapter)
        message = pb.InferenceReply()
        reply = message.step_done
        reply.step_id, reply.supplied = step.step_id, supplied
        reply.queue_us, reply.compute_us = int(done.queue_s * 1e6), int(done.compute_s * 1e6)
        pieces: list[memoryview] = []
        if not step.silent:
            encoding = self._encoding(opening.reply_encoding)
            _, pieces = encode_tensor(done.value, encoding, header=reply.hidden)
            if session.notary is not None:
                reply.signature = await session.notary.sign(step.step_id, done.value, encoding)
        conversation.reply(message)
        if step.HasField("push_to") and not step.silent:
            push = partial(self._pusher.push, step.push_to, reply.hidden, pieces, asker=messages.remote_peer)
            await together(push, partial(self._answer, messages, message, *pieces))
        else:
            await self._answer(messages, message, *pieces)
        self._speed.note(len(session.cache.blocks), opening.batch_size, step.hidden.shape[1], done.compute_s)
        work = block_tokens(len(session.cache.blocks), opening.batch_size, step.hidden.shape[1])
        self.gave(messages.remote_peer, work)

    async def _compute(
        self,
        messages: Asker,
        visitor: Visitor,
        cache: SpanCache,
        position: int,
        tensors: dict[str, Tensor],
        adapter: Adapter,
    ) -> Timed[Tensor]:
        """One step; a long one in pieces, between which others' steps may slip in."""
        hidden = tensors["hidden"]
        rows, tokens = hidden.shape[:2]
        prompts = tensors.get("prompts")
        longest = max(1, self.config.prefill_chunk_tokens // rows)
        priority = Priority.DECODE if tokens <= DECODE_TOKENS else Priority.PREFILL
        outputs: list[Tensor] = []
        queue_s = compute_s = 0.0
        begin = 0
        while begin < tokens:
            piece = longest
            if priority == Priority.PREFILL:
                piece = max(1, self.lane.piece_rows(visitor, longest * rows) // rows)
            if begin == 0 and prompts is not None:
                piece = max(piece, prompts.shape[2])
            part = tensors if begin == 0 and piece >= tokens else _piece_of(tensors, position, begin, piece)
            step = StepWork(self.span, cache, position + begin, part, adapter)
            work = step if step.can_join else step.alone
            if begin:
                self._check_wanted(messages)
            done = await self.lane.submit(priority, work, peer_id=messages.remote_peer, cost=step.rows, visitor=visitor)
            outputs.append(done.value)
            queue_s += done.queue_s
            compute_s += done.compute_s
            begin += piece
        return Timed(whole(outputs), queue_s, compute_s)

    async def _pushed(
        self, messages: Asker, conversation: Conversation, mailbox: Mailbox, step: pb.Step
    ) -> tuple[Tensor | None, bool]:
        """The input of a pushed step, and whether the client supplied it. None: the client has ended."""
        found: Tensor | None = None
        supplying = False
        refused: list[SwarmError] = []

        async def from_client() -> None:
            nonlocal found, supplying
            try:
                request = await self._next_request(messages)
                supplying = request is not None and conversation.request(request) == "supply"
                if request is not None and supplying:
                    found = (await self._read_payload(messages, [_hidden_of(request.supply)]))["hidden"]
            except SwarmError as error:
                refused.append(error)
            nursery.cancel_scope.cancel()

        async def from_server() -> None:
            nonlocal found
            pushed = await mailbox.take(step)
            self._charge(pushed.sender, -1)
            pushed.lease.release()  # from here on it is the session's, as if its client had sent it
            if not supplying:  # a payload that is being read must be read to its end
                found = decode_tensor(pushed.push.hidden, pushed.payload)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(from_client)
            nursery.start_soon(from_server)
        if refused and found is None:
            raise refused[0]
        return found, supplying

    async def _next_request(self, messages: Asker, idle_s: float | None = None) -> pb.InferenceRequest | None:
        with messages.within(idle_s or self.config.session_idle_s):
            data = await messages.read_message()
        return None if data is None else parse(pb.InferenceRequest(), data)

    @contextmanager
    def _mailbox(self, opening: pb.Open) -> Iterator[Mailbox]:
        if opening.session_id in self._mailboxes:
            raise Refused(pb.MALFORMED, "there is a session of this id")
        mailbox = self._mailboxes[opening.session_id] = Mailbox(opening)
        try:
            yield mailbox
        finally:
            del self._mailboxes[opening.session_id]
            mailbox.clear()


def _piece_of(tensors: dict[str, Tensor], position: int, begin: int, tokens: int) -> dict[str, Tensor]:
    """Some tokens of a step at `position`, from its token `begin` on."""
    part = {"hidden": tensors["hidden"][:, begin : begin + tokens]}
    if "attention_mask" in tensors:
        part["attention_mask"] = tensors["attention_mask"][:, : position + begin + part["hidden"].shape[1]]
    if begin == 0:
        part |= {name: tensors[name] for name in ("prompts", "hypo_ids") if name in tensors}
    return part


def _hidden_of(message: pb.Supply | pb.Step) -> tuple[str, pb.Tensor, int]:
    """The input that a message announces, whose shape has been checked."""
    return "hidden", message.hidden, check_header(message.hidden, name="hidden", shape=tuple(message.hidden.shape))
