"""One accepted stream of a server: bytes -> protocol events -> lane -> bytes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import trio
from google.protobuf.message import DecodeError
from torch import Tensor

from petals.models.adapters import Lora, check_lora
from petals.models.block import BlockSpan
from petals.models.cache import SpanCache
from petals.models.errors import ModelError
from petals.peer.config import ServeConfig
from petals.peer.lora import decode_lora
from petals.peer.server.lane import Lane, Priority, Timed
from petals.peer.server.leases import CacheBudget, Lease, NoRoom
from petals.peer.server.mailbox import Mailbox, Pushed
from petals.peer.server.push import Pusher
from petals.peer.server.throughput import Speedometer
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import PeerUnreachable, ProtocolViolation, RemoteProtocolError, SwarmError
from petals.protocols.inference import MAX_MESSAGE_BYTES, Conversation, check_model, step_payload
from petals.protocols.lora import lora_payload
from petals.protocols.push import push_payload
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.tensors import (
    COMPRESSIONS,
    MAX_TENSOR_BYTES,
    WIRE_DTYPES,
    check_header,
    decode_tensor,
    encode_tensor,
)
from petals.protocols.training import request_payload
from petals.protocols.types import ModelId, PeerId

log = logging.getLogger(__name__)

DECODE_TOKENS = 8
"""New tokens per row up to which a step counts as decoding: drafts that are checked, too."""
GOODBYE_S = 5.0
GOODBYE_READS = 4096
"""Of 64 KiB at most: as much as the largest tensor that may have been announced."""

Adapter = str | Lora | None
"""A hosted one by its name, or one that the client sent."""
Plan = Sequence[tuple[str, pb.Tensor, int]]
Reply = pb.InferenceReply | pb.TrainingReply
Request = TypeVar("Request", pb.InferenceRequest, pb.TrainingRequest, pb.Push)


class Refused(SwarmError):
    """What we answer an asker whose request can not be served; ends the stream, and nothing else."""

    def __init__(self, code: pb.ErrorCode, message: str, retry_after_s: float = 0.0) -> None:
        self.code = code
        self.retry_after_s = retry_after_s
        super().__init__(message)

    def as_message(self) -> pb.Error:
        return pb.Error(code=self.code, message=str(self)[:1000], retry_after_ms=int(self.retry_after_s * 1000))


@dataclass(frozen=True, slots=True)
class _Trained:
    """What comes out of a training request: forward the output, backward the gradients."""

    hidden: Tensor
    prompts: Tensor | None = None
    lora: Sequence[Tensor] = ()
    """Of A and B of each layer, in order."""


class Inbound:
    """Answers streams about one loaded span."""

    def __init__(
        self,
        model: ModelId,
        span: BlockSpan,
        lane: Lane,
        budget: CacheBudget,
        config: ServeConfig,
        speed: Speedometer,
        pusher: Pusher,
    ) -> None:
        self.model = model
        self.span = span
        self.lane = lane
        self.budget = budget
        self.config = config
        self.leaving = False
        self._speed = speed
        self._pusher = pusher
        self._mailboxes: dict[bytes, Mailbox] = {}
        self._sessions: Counter[PeerId] = Counter()
        self._scopes: set[trio.CancelScope] = set()
        self._went = trio.Event()

    @property
    def sessions(self) -> int:
        """Inference sessions that are open now."""
        return self._sessions.total()

    async def until_idle(self) -> None:
        """Return when nobody is being served."""
        while self._scopes:
            self._went = trio.Event()
            await self._went.wait()

    async def cut(self) -> None:
        """End whatever is being served, saying that we leave; its clients go on elsewhere."""
        for scope in self._scopes:
            scope.cancel()
        await self.until_idle()

    async def answer_inference(self, stream: ByteStream) -> None:
        """Serve one inference session until the client closes it, breaks a rule, or vanishes."""
        await self._guarded(stream, self._session, lambda error: pb.InferenceReply(error=error))

    async def answer_training(self, stream: ByteStream, *, backward: bool) -> None:
        """Serve one forward or backward request."""
        train = partial(self._train, backward=backward)
        await self._guarded(stream, train, lambda error: pb.TrainingReply(error=error))

    async def answer_push(self, stream: ByteStream) -> None:
        """Take one push into the mailbox of its session. One that fits nowhere costs its sender the stream."""
        messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
        with self._count(stream.remote_peer), self._deadline(self.config.payload_s):
            data = await messages.read_message()
            push = _parse(pb.Push(), data or b"")
            mailbox = self._mailboxes.get(push.session_id)
            if mailbox is None:
                await messages.reset()
                return
            size = push_payload(push, mailbox.opening.batch_size, mailbox.opening.max_length, self.span.hidden_size)
            mailbox.put(Pushed(stream.remote_peer, push, await messages.read_payload(size)))

    async def _guarded(
        self, stream: ByteStream, serve: Callable[[MessageStream], Awaitable[None]], reply: Callable[[pb.Error], Reply]
    ) -> None:
        """Serve one stream; what goes wrong by the asker's doing is told to it, and ends this stream only."""
        messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
        try:
            with self._count(stream.remote_peer) as scope:
                await serve(messages)
            if not scope.cancelled_caught:
                return
            error = pb.Error(code=pb.LEAVING, message="this server is moving to other blocks")
        except Refused as refusal:
            error = refusal.as_message()
        except ModelError as unsupported:  # a mask or prompt that does not fit what the blocks can do
            error = pb.Error(code=pb.UNSUPPORTED, message=str(unsupported)[:1000])
        except (RemoteProtocolError, ProtocolViolation) as violation:
            log.info("…%s broke the rules: %s", stream.remote_peer[-6:], violation)
            error = _blame(violation)
        await self._say_goodbye(messages, reply(error))

    async def _session(self, messages: MessageStream) -> None:
        conversation = Conversation()
        request = await self._next_request(messages)
        if request is None:
            return
        if conversation.request(request) == "close":
            return
        opening = request.open
        blocks = self._check_servable(opening)
        if opening.session_id in self._mailboxes:
            raise Refused(pb.MALFORMED, "there is a session of this id")
        factors = lora_payload(opening.lora, blocks)
        nbytes = self.span.cache_bytes(blocks, opening.batch_size, opening.max_length) + self._lora_bytes(factors)
        with await self._lease(messages.remote_peer, nbytes, opening.wait_ms / 1000), self._mailbox(opening) as mailbox:
            adapter = await self._read_adapter(messages, opening, factors)
            cache = self.span.new_cache(blocks, opening.batch_size, opening.max_length)
            reply = pb.InferenceReply(
                opened=pb.Opened(dtype=WIRE_DTYPES[self.span.dtype], cache_bytes=nbytes),
            )
            conversation.reply(reply)
            await self._answer(messages, reply)
            while (request := await self._next_request(messages)) is not None:
                match conversation.request(request):
                    case "close":
                        return
                    case "supply":  # the push was faster
                        await self._read_payload(messages, [_hidden_of(request.supply)])
                    case _:
                        await self._step(messages, conversation, cache, adapter, mailbox, request.step)

    async def _lease(self, peer_id: PeerId, nbytes: int, wait_s: float) -> Lease:
        try:
            return await self.budget.acquire(peer_id, nbytes, min(wait_s, self.config.max_wait_s))
        except NoRoom as no_room:
            code = pb.QUOTA if no_room.for_ever else pb.BUSY
            raise Refused(code, str(no_room), 0.0 if no_room.for_ever else 1.0) from None

    def _lora_bytes(self, factors: Plan) -> int:
        nbytes = sum(size for _, _, size in factors)
        if nbytes > self.config.max_lora_bytes:
            raise Refused(pb.QUOTA, f"{nbytes} bytes of low-rank updates, at most {self.config.max_lora_bytes}")
        return nbytes

    async def _read_adapter(self, messages: MessageStream, opening: pb.Open, factors: Plan) -> Adapter:
        lora = decode_lora(opening.lora, await self._read_payload(messages, factors))
        if lora is not None:
            check_lora(lora, self.span)
        return lora or opening.adapter or None

    async def _step(
        self,
        messages: MessageStream,
        conversation: Conversation,
        cache: SpanCache,
        adapter: Adapter,
        mailbox: Mailbox,
        step: pb.Step,
    ) -> None:
        assert conversation.opening is not None
        opening = conversation.opening
        tokens = step.hidden.shape[1] * opening.batch_size
        if tokens > self.config.max_batch_tokens:
            raise Refused(pb.TOO_LONG, f"{tokens} tokens in one step, at most {self.config.max_batch_tokens}")
        self._check_answer(tokens)
        tensors = await self._read_payload(messages, step_payload(step, opening, self.span.hidden_size))
        supplied = False
        if step.pushed_by:
            hidden, supplied = await self._pushed(messages, conversation, mailbox, step)
            if hidden is None:
                return
            tensors["hidden"] = hidden
        hypo_ids = tensors.get("hypo_ids")
        if hypo_ids is not None and not bool(((hypo_ids >= 0) & (hypo_ids < opening.batch_size)).all()):
            raise RemoteProtocolError(f"hypo_ids outside 0:{opening.batch_size}")
        done = await self._compute(messages.remote_peer, cache, step.position, tensors, adapter)
        self._speed.note(len(cache.blocks), opening.batch_size, step.hidden.shape[1], done.compute_s)
        reply = pb.StepDone(
            step_id=step.step_id,
            queue_us=int(done.queue_s * 1e6),
            compute_us=int(done.compute_s * 1e6),
            supplied=supplied,
        )
        pieces: list[memoryview] = []
        if not step.silent:
            header, pieces = encode_tensor(done.value, self._encoding(opening.reply_encoding))
            reply.hidden.CopyFrom(header)
        message = pb.InferenceReply(step_done=reply)
        conversation.reply(message)
        async with trio.open_nursery() as nursery:
            if step.HasField("push_to") and not step.silent:
                nursery.start_soon(self._pusher.push, step.push_to, reply.hidden, pieces)
            await self._answer(messages, message, *pieces)

    async def _compute(
        self, peer_id: PeerId, cache: SpanCache, position: int, tensors: dict[str, Tensor], adapter: Adapter
    ) -> Timed[Tensor]:
        """One step; a long one in pieces, between which others' steps may slip in."""
        whole = tensors["hidden"]
        rows, tokens = whole.shape[:2]
        prompts = tensors.get("prompts")
        piece = max(1, self.config.prefill_chunk_tokens // rows, 0 if prompts is None else prompts.shape[2])
        priority = Priority.DECODE if tokens <= DECODE_TOKENS else Priority.PREFILL
        outputs: list[Tensor] = []
        queue_s = compute_s = 0.0
        for begin in range(0, tokens, piece):
            part = {"hidden": whole[:, begin : begin + piece]}
            if "attention_mask" in tensors:
                part["attention_mask"] = tensors["attention_mask"][:, : position + begin + part["hidden"].shape[1]]
            if begin == 0:
                part |= {name: tensors[name] for name in ("prompts", "hypo_ids") if name in tensors}
            work = partial(self._run_step, cache, position + begin, part, adapter)
            cost = rows * part["hidden"].shape[1]
            done = await self.lane.submit(priority, work, peer_id=peer_id, cost=cost)
            outputs.append(done.value)
            queue_s += done.queue_s
            compute_s += done.compute_s
        return Timed(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), queue_s, compute_s)

    async def _pushed(
        self, messages: MessageStream, conversation: Conversation, mailbox: Mailbox, step: pb.Step
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
            if not supplying:  # a payload that is being read must be read to its end
                found = decode_tensor(pushed.push.hidden, pushed.payload)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(from_client)
            nursery.start_soon(from_server)
        if refused and found is None:
            raise refused[0]
        return found, supplying

    def _run_step(self, cache: SpanCache, position: int, tensors: dict[str, Tensor], adapter: Adapter) -> Tensor:
        """In the compute thread."""
        if position < cache.position:
            cache.rollback(position)
        hidden = tensors["hidden"].to(self.span.dtype)
        return self.span.step(
            hidden,
            cache,
            attention_mask=tensors.get("attention_mask"),
            prompts=tensors.get("prompts"),
            hypo_ids=tensors.get("hypo_ids"),
            adapter=adapter,
        )

    async def _train(self, messages: MessageStream, *, backward: bool) -> None:
        with self._deadline(self.config.payload_s):
            data = await messages.read_message()
        if data is None:
            return
        request = _parse(pb.TrainingRequest(), data)
        check_model(request.model_digest, request.start_block, request.end_block)
        blocks = self._check_servable(request)
        plan = request_payload(request, self.span.hidden_size, backward=backward)
        tokens = request.hidden.shape[0] * request.hidden.shape[1]
        if tokens > self.config.max_batch_tokens:
            raise Refused(pb.TOO_LONG, f"{tokens} tokens in one request, at most {self.config.max_batch_tokens}")
        self._check_answer(tokens)
        lora_bytes = self._lora_bytes([entry for entry in plan if entry[0].startswith("lora.")])
        peer_id, wait_s = messages.remote_peer, self.config.max_wait_s
        with await self._lease(peer_id, lora_bytes, wait_s) if lora_bytes else nullcontext():
            tensors = await self._read_payload(messages, plan)
            adapter = decode_lora(request.lora, tensors) or request.adapter or None
            run = self._run_backward if backward else self._run_forward
            priority = Priority.BACKWARD if backward else Priority.FORWARD
            work = partial(run, blocks, tensors, adapter)
            done = await self.lane.submit(priority, work, peer_id=messages.remote_peer, cost=tokens)
        reply = pb.TrainingDone(queue_us=int(done.queue_s * 1e6), compute_us=int(done.compute_s * 1e6))
        encoding = self._encoding(request.reply_encoding)
        header, pieces = encode_tensor(done.value.hidden, encoding)
        reply.hidden.CopyFrom(header)
        if done.value.prompts is not None:
            header, more = encode_tensor(done.value.prompts, encoding)
            reply.prompts.CopyFrom(header)
            pieces += more
        for factor in done.value.lora:
            header, more = encode_tensor(factor)
            reply.lora.append(header)
            pieces += more
        await self._answer(messages, pb.TrainingReply(done=reply), *pieces)

    def _run_forward(self, blocks: range, tensors: dict[str, Tensor], adapter: Adapter) -> _Trained:
        """In the compute thread."""
        with torch.inference_mode():
            hidden = self.span.forward(
                tensors["hidden"].to(self.span.dtype),
                blocks,
                attention_mask=tensors.get("attention_mask"),
                prompts=tensors.get("prompts"),
                adapter=adapter,
            )
        return _Trained(hidden)

    def _run_backward(self, blocks: range, tensors: dict[str, Tensor], adapter: Adapter) -> _Trained:
        """In the compute thread. The forward pass is run again: nothing is kept between the two requests."""
        hidden = tensors["hidden"].to(self.span.dtype)
        prompts = tensors.get("prompts")
        factors = adapter.factors() if isinstance(adapter, Lora) else []
        inputs = [hidden, *([] if prompts is None else [prompts]), *factors]
        for each in inputs:
            each.requires_grad_()
        with torch.enable_grad():
            output = self.span.forward(
                hidden,
                blocks,
                attention_mask=tensors.get("attention_mask"),
                prompts=prompts,
                adapter=adapter,
            )
            gradients = torch.autograd.grad(
                output, inputs, tensors["grad_output"].to(output.dtype), allow_unused=True, materialize_grads=True
            )  # a token may pass an expert by, and its factors with it
        given = len(inputs) - len(factors)
        return _Trained(gradients[0], gradients[1] if prompts is not None else None, gradients[given:])

    def _encoding(self, asked: pb.Encoding) -> pb.Encoding:
        """How an answer travels: as asked, or shorter if the operator saves bytes."""
        return asked if asked != pb.RAW else COMPRESSIONS[self.config.compression]

    def _check_answer(self, tokens: int) -> None:
        """A small request in a short dtype may have an answer that is too large to travel."""
        if tokens * self.span.hidden_size * self.span.dtype.itemsize > MAX_TENSOR_BYTES:
            raise Refused(pb.TOO_LONG, f"the answer to {tokens} tokens would be over {MAX_TENSOR_BYTES} bytes")

    def _check_servable(self, asked: pb.Open | pb.TrainingRequest) -> range:
        if self.leaving:
            raise Refused(pb.LEAVING, "this server is shutting down")
        if asked.model_digest != self.model.digest:
            raise Refused(pb.UNKNOWN_MODEL, f"this server holds {self.model.name} ({self.model.digest[:12]})")
        held, start, end, adapter = self.span.blocks, asked.start_block, asked.end_block, asked.adapter
        if start < held.start or end > held.stop:
            raise Refused(pb.BLOCKS_NOT_HELD, f"blocks {start}:{end} asked, {held.start}:{held.stop} are held")
        if adapter and adapter not in self.span.adapters:
            raise Refused(pb.UNSUPPORTED, f"adapter {adapter[:100]!r} is not hosted here")
        if adapter and asked.lora:
            raise Refused(pb.UNSUPPORTED, "a hosted adapter and updates of the client's own do not go together")
        return range(start, end)

    async def _next_request(self, messages: MessageStream) -> pb.InferenceRequest | None:
        with self._deadline(self.config.session_idle_s):
            data = await messages.read_message()
        return None if data is None else _parse(pb.InferenceRequest(), data)

    async def _answer(self, messages: MessageStream, reply: Reply, *payload: memoryview) -> None:
        """Send an answer; a peer that does not take it in time loses its stream, and with it its lease."""
        with trio.move_on_after(self.config.payload_s) as scope:
            await messages.write_message(reply.SerializeToString(), *payload)
        if scope.cancelled_caught:
            raise PeerUnreachable("the answer was not taken", messages.remote_peer)

    async def _read_payload(self, messages: MessageStream, plan: Plan) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        with self._deadline(self.config.payload_s):
            for name, header, nbytes in plan:
                tensors[name] = decode_tensor(header, await messages.read_payload(nbytes))
        return tensors

    @contextmanager
    def _mailbox(self, opening: pb.Open) -> Iterator[Mailbox]:
        mailbox = self._mailboxes[opening.session_id] = Mailbox(opening)
        try:
            yield mailbox
        finally:
            del self._mailboxes[opening.session_id]

    @contextmanager
    def _deadline(self, seconds: float) -> Iterator[None]:
        with trio.move_on_after(seconds) as scope:
            yield
        if scope.cancelled_caught:
            raise Refused(pb.OUT_OF_ORDER, f"nothing came for {seconds:.0f} s")

    @contextmanager
    def _count(self, peer_id: PeerId) -> Iterator[trio.CancelScope]:
        if self._sessions[peer_id] >= self.config.max_sessions_per_peer:
            limit = self.config.max_sessions_per_peer
            raise Refused(pb.QUOTA, f"one peer may have {limit} sessions and requests here", retry_after_s=5.0)
        self._sessions[peer_id] += 1
        try:
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                yield scope
        finally:
            self._scopes.discard(scope)
            self._sessions[peer_id] -= 1
            self._sessions += Counter()  # drops peers that have none
            self._went.set()

    async def _say_goodbye(self, messages: MessageStream, reply: Reply) -> None:
        """Say what was wrong and end the stream. What the peer is still sending is read and dropped for a while: a
        reset in answer to it would overtake our words."""
        with trio.move_on_after(GOODBYE_S):
            await messages.write_message(reply.SerializeToString())
            await messages.close_write()
            for _ in range(GOODBYE_READS):
                if not await messages.stream.read(64 << 10):
                    return


def _hidden_of(supply: pb.Supply) -> tuple[str, pb.Tensor, int]:
    """The payload of a supply, whose shape its conversation has checked."""
    return "hidden", supply.hidden, check_header(supply.hidden, name="hidden", shape=tuple(supply.hidden.shape))


def _blame(error: RemoteProtocolError | ProtocolViolation) -> pb.Error:
    late = isinstance(error, ProtocolViolation) and error.out_of_order
    return pb.Error(code=pb.OUT_OF_ORDER if late else pb.MALFORMED, message=str(error)[:1000])


def _parse(message: Request, data: bytes) -> Request:
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise RemoteProtocolError("a message that does not decode") from None
    return message
