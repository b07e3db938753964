"""One server of a session: the conversation with it, and what it was told so far."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

import torch
import trio
from google.protobuf.message import DecodeError
from torch import Tensor

from petals.models.blocks.adapters import Lora
from petals.peer.accounting.ledger import nobody_counts
from petals.peer.base.concurrency import shielded_for, together
from petals.peer.base.config import Timeouts
from petals.peer.client.routing.local_blocks import Home
from petals.peer.engine.lora_codec import encode_lora
from petals.peer.net.host import Host
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import (
    Forbidden,
    LocalProtocolError,
    NeverFits,
    PeerBusy,
    PeerUnreachable,
    ProtocolViolation,
    RemoteError,
    RemoteProtocolError,
    RequestRefused,
)
from petals.protocols.inference import INFERENCE_V1, MAX_MESSAGE_BYTES, Conversation
from petals.protocols.receipts import block_tokens
from petals.protocols.stream import MessageStream
from petals.protocols.tensors import DTYPES, check_header, decode_tensor, encode_tensor
from petals.protocols.types import ModelId, PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """What goes into a span at one step; enough to run it again elsewhere."""

    position: int
    hidden: Tensor
    """(batch, new_tokens, hidden_size), on the CPU, in the dtype that travels."""
    attention_mask: Tensor | None = None
    prompts: Tensor | None = None
    """(blocks of the span, batch, prefix, hidden_size)"""
    hypo_ids: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What came back, and where its time went in seconds."""

    hidden: Tensor | None
    round_trip_s: float
    queue_s: float
    compute_s: float
    supplied: bool = False
    """A push was expected and did not come."""
    sent_at: float = 0.0
    """By trio's clock."""
    step_id: int = 0
    signature: bytes = b""
    encoding: pb.Encoding = pb.RAW
    """How `hidden` travelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSpec:
    """What every hop of a session is asked for."""

    model: ModelId
    hidden_size: int
    batch_size: int
    max_length: int
    adapter: str = ""
    lora: Lora | None = None
    """Low-rank updates of the client's own, sent with the opening."""
    encoding: pb.Encoding = pb.RAW
    prefixes: tuple[bytes, ...] = ()
    """Names of the beginning of the sequence (protocols/prefixes.py), whose cache a server may still have."""
    took: Callable[[PeerId, int], None] = nobody_counts
    """Told who did how many block-tokens of work for us."""


def error_of(reply: pb.Error, peer_id: PeerId) -> RemoteError | LocalProtocolError:
    """A server's error as the exception whose type says what to do next."""
    message = f"peer …{peer_id[-6:]} says: {reply.message[:500]}"
    match reply.code:
        case pb.BUSY | pb.LEAVING:
            return PeerBusy(message, peer_id, reply.retry_after_ms / 1000 or None)
        case pb.QUOTA if reply.retry_after_ms:
            return PeerBusy(message, peer_id, reply.retry_after_ms / 1000)
        case pb.QUOTA | pb.TOO_LONG:
            return NeverFits(message, peer_id)
        case pb.FORBIDDEN:
            return Forbidden(message, peer_id)
        case pb.INTERNAL:
            return PeerUnreachable(message, peer_id)
        case _:
            return RequestRefused(message, peer_id)


class answer_within:
    """Silence for longer than this means the peer is gone, for us."""

    def __init__(self, seconds: float, peer_id: PeerId) -> None:
        self._seconds, self._peer_id = seconds, peer_id

    def __enter__(self) -> None:
        self._scope = trio.move_on_after(self._seconds)
        self._scope.__enter__()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        swallowed = self._scope.__exit__(exc_type, exc, tb)
        if self._scope.cancelled_caught:
            raise PeerUnreachable(
                f"peer …{self._peer_id[-6:]} did not answer within {self._seconds:.1f} s", self._peer_id
            )
        return swallowed


async def read_reply(messages: MessageStream, reply: pb.InferenceReply | pb.TrainingReply | pb.InfoReply) -> None:
    """Fill `reply` with the next message.

    Raises:
        PeerUnreachable: the stream ended. RemoteProtocolError: it does not decode.
    """
    data = await messages.read_message()
    if data is None:
        raise PeerUnreachable(f"peer …{messages.remote_peer[-6:]} ended the stream", messages.remote_peer)
    try:
        reply.ParseFromString(data)
    except DecodeError:
        raise RemoteProtocolError("a reply that does not decode", messages.remote_peer) from None


async def read_tensor(messages: MessageStream, header: pb.Tensor, shape: Sequence[int], name: str) -> Tensor:
    """The tensor that follows, which must have this shape and be floating."""
    payload = await messages.read_payload(check_header(header, name=name, shape=shape))
    return decode_tensor(header, payload)


@dataclass
class Hop:
    """An open session at one server. `history` is all it was told, in order, as far as it still matters."""

    peer_id: PeerId
    blocks: range
    spec: SessionSpec
    timeouts: Timeouts
    messages: MessageStream
    conversation: Conversation
    addrs: tuple[str, ...] = ()
    session_id: bytes = b""
    dtype: torch.dtype = torch.float32
    """Of its answers."""
    quant_type: str = "none"
    public_key: bytes = b""
    """What it signs its answers with; empty: it does not sign."""
    encoding: pb.Encoding = pb.RAW
    """How its latest answer travelled."""
    on_answer: Callable[[Hop, StepOutput], None] | None = None
    """Told of each answer, when its step is history."""
    history: list[StepInput] = field(default_factory=list)
    rebuilt: bool = False
    """Its cache was made from history during this step: rows that a roll-back left reordered elsewhere are not here."""
    move_at: float = -math.inf
    """Not before this time is a better connection looked for, or a faster server."""
    slow_steps: int = 0
    """In a row, that others would have done several times sooner (session/moving.py)."""
    serialise_s: float = 0.0
    """Spent on making messages so far."""
    s_per_token: float = math.nan
    """Smoothed round trip per new token and row position; not a number before the first step."""

    @classmethod
    async def open(
        cls,
        host: Host | Home,
        peer_id: PeerId,
        addrs: Sequence[str],
        blocks: range,
        spec: SessionSpec,
        timeouts: Timeouts,
    ) -> Hop:
        """Open a stream, lease cache room.

        Raises:
            RemoteError: its type says why not.
        """
        with answer_within(timeouts.open_s, peer_id):
            stream = await host.open_stream(peer_id, INFERENCE_V1, addrs=addrs)
            hop = cls(
                peer_id, blocks, spec, timeouts,
                MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES), Conversation(),
                addrs=tuple(addrs), session_id=secrets.token_bytes(16),
            )  # fmt: skip
            try:
                lora, payload = encode_lora(spec.lora, blocks)
                request = pb.InferenceRequest(
                    open=pb.Open(
                        session_id=hop.session_id,
                        model_digest=spec.model.digest,
                        start_block=blocks.start,
                        end_block=blocks.stop,
                        batch_size=spec.batch_size,
                        max_length=spec.max_length,
                        wait_ms=int(timeouts.open_s * 800),
                        adapter=spec.adapter,
                        reply_encoding=spec.encoding,
                        lora=lora,
                        prefixes=spec.prefixes,
                        # Always: if only auditors asked for it, liars would know when to be honest.
                        sign=True,
                    )
                )
                await hop._send(request, *payload)
                opened = (await hop._receive("opened")).opened
                hop.dtype = DTYPES.get(opened.dtype, hop.dtype)
                hop.public_key, hop.quant_type = opened.public_key, opened.quant_type or hop.quant_type
            except BaseException:
                await hop.reset()
                raise
        return hop

    def truncate(self, position: int) -> Tensor | None:
        """Forget the steps at or after `position`. Returns the row order they had made, None if they kept it."""
        order: Tensor | None = None
        dropped = [step for step in self.history if step.position >= position]
        self.history = [step for step in self.history if step.position < position]
        for step in dropped:
            if step.hypo_ids is not None:
                order = step.hypo_ids if order is None else order[step.hypo_ids]
        return order

    def deadline_s(self, tokens: int) -> float:
        """How long a step of `tokens` may take here: adapts to the hop's own speed."""
        if math.isnan(self.s_per_token):
            return self.timeouts.step_s
        return min(self.timeouts.step_s, max(self.timeouts.min_step_s, 20 * self.s_per_token * tokens))

    def push_target(self) -> pb.PushTo:
        """Where a server pushes the input of the next step to."""
        return pb.PushTo(
            peer_id=self.peer_id,
            addrs=self.addrs,
            session_id=self.session_id,
            step_id=self.conversation.next_step_id,
        )

    async def step(
        self, step: StepInput, *, replayed_as: StepInput | None = None, push_to: pb.PushTo | None = None
    ) -> StepOutput:
        """One step, waited for with a deadline that fits the hop's own speed. Then it is history.

        Args:
            step: what the server is told.
            replayed_as: what another server would have to be told instead (after a roll-back of reordered rows).
            push_to: where the output goes, besides to us.
        """
        started = trio.current_time()
        with answer_within(self.deadline_s(step.hidden.shape[1]), self.peer_id):
            await self._send_step(step, silent=False, push_to=push_to)
            output = await self._receive_step(step, started)
        self.remember(replayed_as or step, output)
        return output

    def remember(self, step: StepInput, output: StepOutput) -> None:
        """A step is done and becomes history."""
        self.history.append(step)
        if self.on_answer is not None:
            self.on_answer(self, output)
        measured = output.round_trip_s / step.hidden.shape[1]
        self.s_per_token = measured if math.isnan(self.s_per_token) else 0.8 * self.s_per_token + 0.2 * measured

    async def announce(self, step: StepInput, *, pushed_by: PeerId, push_to: pb.PushTo | None) -> None:
        """Tell of a step whose input another server pushes. Of `step.hidden` only the shape and dtype are told."""
        await self._send_step(step, silent=False, pushed_by=pushed_by, push_to=push_to)

    async def supply(self, hidden: Tensor) -> None:
        """Send the input of the announced step after all. Not cut short by the answer: half a message would end the
        session.

        Raises:
            PeerUnreachable: it does not read.
        """
        header, payload = encode_tensor(hidden, self.spec.encoding)
        supply = pb.Supply(step_id=self.conversation.next_step_id - 1, hidden=header)
        with shielded_for(self.deadline_s(hidden.shape[1])) as scope:
            await self._send(pb.InferenceRequest(supply=supply), *payload)
        if scope.cancelled_caught:
            raise PeerUnreachable(f"peer …{self.peer_id[-6:]} does not take what it is sent", self.peer_id)

    async def answer(self, step: StepInput) -> StepOutput:
        """The answer to an announced step; the caller minds the time."""
        return await self._receive_step(step, trio.current_time())

    async def replay(self, history: Sequence[StepInput], *, want_outputs: bool) -> list[Tensor]:
        """Rebuild the cache from `history` with the same step boundaries, all steps in flight at once.

        Returns: the output of each step, if `want_outputs`.
        """
        started = trio.current_time()

        async def send_all() -> None:
            for step in history:
                await self._send_step(step, silent=not want_outputs)

        async def receive_all() -> list[Tensor]:
            outputs = [await self._receive_step(step, started, silent=not want_outputs) for step in history]
            return [output.hidden for output in outputs if output.hidden is not None]

        with answer_within(self.timeouts.step_s, self.peer_id):
            outputs = await together(send_all, receive_all)
        self.history.extend(history)
        return outputs

    async def pipe(
        self,
        indices: trio.MemoryReceiveChannel[int],
        find: Callable[[int], tuple[StepInput, StepInput]],
        take: Callable[[StepOutput], None],
    ) -> None:
        """Steps as their inputs come, without waiting for one answer before the next is sent.

        Args:
            find: index -> what the server is told, and what another one would have to be told instead.
            take: called with the answers, in order.
        """
        sent_in, sent = trio.open_memory_channel[tuple[StepInput, StepInput, float]](math.inf)

        async def send_all() -> None:
            with sent_in:
                async for index in indices:
                    told, remembered = find(index)
                    with answer_within(self.timeouts.step_s, self.peer_id):
                        await self._send_step(told, silent=False)
                    sent_in.send_nowait((told, remembered, trio.current_time()))

        async def receive_all() -> None:
            answered_at = -math.inf
            async for told, remembered, sent_at in sent:
                with answer_within(self.deadline_s(told.hidden.shape[1]), self.peer_id):
                    output = await self._receive_step(told, max(sent_at, answered_at))
                answered_at = trio.current_time()
                self.remember(remembered, output)
                take(output)

        await together(send_all, receive_all)

    async def close(self, prefixes: Sequence[bytes] = ()) -> None:
        """Give the lease back politely; never raises, bounded.

        Args:
            prefixes: names of what the cache holds, which the server may keep; waits until it has.
        """
        with shielded_for(self.timeouts.reset_s) as scope:
            try:
                await self._send(pb.InferenceRequest(close=pb.Close(prefixes=prefixes)))
                if prefixes:
                    await self.messages.close_write()
                    await self.messages.read_message()
                await self.messages.close()
            except (RemoteError, LocalProtocolError):
                await self.messages.reset()
        if scope.cancelled_caught:
            await self.reset()

    async def reset(self) -> None:
        """Give the lease back at once; never raises."""
        with shielded_for(self.timeouts.reset_s):
            await self.messages.reset()

    async def _send_step(
        self, step: StepInput, *, silent: bool, pushed_by: PeerId | None = None, push_to: pb.PushTo | None = None
    ) -> None:
        began = time.perf_counter()
        request = pb.InferenceRequest()
        message = request.step
        message.step_id, message.position, message.silent = self.conversation.next_step_id, step.position, silent
        if push_to is not None:
            message.push_to.CopyFrom(push_to)
        _, payload = encode_tensor(step.hidden, self.spec.encoding, header=message.hidden)
        if pushed_by is not None:
            message.pushed_by, payload = pushed_by, []
        for name, tensor in (
            ("attention_mask", step.attention_mask),
            ("prompts", step.prompts),
            ("hypo_ids", step.hypo_ids),
        ):
            if tensor is not None:
                payload += encode_tensor(tensor, header=getattr(message, name))[1]
        self.serialise_s += time.perf_counter() - began
        await self._send(request, *payload)

    async def _receive_step(self, step: StepInput, started: float, *, silent: bool = False) -> StepOutput:
        done = (await self._receive("step_done")).step_done
        hidden = None
        if not silent:
            hidden = await read_tensor(self.messages, done.hidden, tuple(step.hidden.shape), "hidden")
            self.encoding = done.hidden.encoding
        self.spec.took(self.peer_id, block_tokens(len(self.blocks), *step.hidden.shape[:2]))
        return StepOutput(
            hidden,
            trio.current_time() - started,
            done.queue_us / 1e6,
            done.compute_us / 1e6,
            done.supplied,
            sent_at=started,
            step_id=done.step_id,
            signature=done.signature,
            encoding=done.hidden.encoding,
        )

    async def _send(self, request: pb.InferenceRequest, *payload: memoryview) -> None:
        try:
            self.conversation.request(request)
        except ProtocolViolation as error:
            raise LocalProtocolError(str(error)) from None
        await self.messages.write_message(request.SerializeToString(), *payload)

    async def _receive(self, expected: str) -> pb.InferenceReply:
        reply = pb.InferenceReply()
        await read_reply(self.messages, reply)
        try:
            kind = self.conversation.reply(reply)
        except ProtocolViolation as error:
            raise RemoteProtocolError(str(error), self.peer_id) from None
        if kind == "error":
            raise error_of(reply.error, self.peer_id)
        if kind != expected:
            raise RemoteProtocolError(f"{kind} instead of {expected}", self.peer_id)
        return reply


def for_blocks(step: StepInput, held: range, wanted: range) -> StepInput:
    """The same step for a sub-range of the span it was made for."""
    if step.prompts is None or held == wanted:
        return step
    return replace(step, prompts=step.prompts[wanted.start - held.start : wanted.stop - held.start])
