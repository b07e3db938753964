"""Forward and backward requests: one accepted stream each, nothing kept in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor

from petals.models.blocks.pieces import BackwardPass, ForwardPass, Pieces, Sequences, backward_bytes, forward_bytes
from petals.peer.engine.lora_codec import decode_lora
from petals.peer.engine.scheduler import Priority, Timed
from petals.peer.engine.stream_rules import PATIENCE_S, Asker, Guard, Plan, Refused, parse
from petals.protocols import messages_pb2 as pb
from petals.protocols.inference import check_model
from petals.protocols.receipts import BACKWARD, block_tokens
from petals.protocols.stream import ByteStream
from petals.protocols.tensors import WIRE_DTYPES, encode_tensor
from petals.protocols.training import request_payload


@dataclass(frozen=True, slots=True)
class _Trained:
    """What comes out of a training request: forward the output, backward the gradients."""

    hidden: Tensor
    prompts: Tensor | None = None
    lora: Sequence[Tensor] = ()
    """Of A and B of each layer, in order."""


FIRST_UNITS = 64
"""Token-blocks of the first piece ever, when nobody knows how long one takes."""
GROWTH = 8


class Trainings(Guard):
    """Answers `/petals/forward` and `/petals/backward`."""

    @cached_property
    def _paces(self) -> dict[Priority, Pace]:
        return {}

    async def answer_training(self, stream: ByteStream, *, backward: bool) -> None:
        """Serve one forward or backward request."""
        train = partial(self._train, backward=backward)
        await self._guarded(stream, train, lambda error: pb.TrainingReply(error=error))

    async def _train(self, messages: Asker, *, backward: bool) -> None:
        with messages.within(self.config.payload_s):
            data = await messages.read_message()
        if data is None:
            return
        request = parse(pb.TrainingRequest(), data)
        check_model(request.model_digest, request.start_block, request.end_block)
        blocks = self._check_servable(request)
        plan = request_payload(request, self.span.hidden_size, backward=backward)
        tokens = request.hidden.shape[0] * request.hidden.shape[1]
        if tokens > self.config.max_batch_tokens:
            raise Refused(pb.TOO_LONG, f"{tokens} tokens in one request, at most {self.config.max_batch_tokens}")
        self._check_answer(tokens)
        self._lora_bytes([entry for entry in plan if entry[0].startswith("lora.")])
        peer_id = messages.remote_peer
        await self._turn(peer_id, tokens, plan)
        held = self._bytes_of(request, plan, blocks, backward=backward)
        keep_bytes = self._keep_bytes(held) if backward else 0
        with await self._hold(peer_id, held + keep_bytes, PATIENCE_S):
            tensors = await self._read_payload(messages, plan)
            done = await self._compute_training(messages, request, blocks, tensors, keep_bytes)
            reply = pb.TrainingDone(queue_us=int(done.queue_s * 1e6), compute_us=int(done.compute_s * 1e6))
            encoding = self._encoding(request.reply_encoding)
            _, pieces = encode_tensor(done.value.hidden, encoding, header=reply.hidden)
            if done.value.prompts is not None:
                _, more = encode_tensor(done.value.prompts, encoding, header=reply.prompts)
                pieces += more
            for factor in done.value.lora:
                _, more = encode_tensor(factor, header=reply.lora.add())
                pieces += more
            await self._answer(messages, pb.TrainingReply(done=reply), *pieces)
        done_work = block_tokens(len(blocks), request.hidden.shape[0], request.hidden.shape[1])
        self.gave(peer_id, done_work * BACKWARD if backward else done_work)
        self._charge(peer_id, -1)

    def _bytes_of(self, request: pb.TrainingRequest, plan: Plan, blocks: range, *, backward: bool) -> int:
        """What a request makes us hold: its tensors as they come and as they are computed with, and what is kept on the
        way."""
        batch, tokens, _ = request.hidden.shape
        as_they_are = WIRE_DTYPES[self.span.dtype]
        held = sum(
            size + (0 if (header.encoding, header.dtype) == (pb.RAW, as_they_are) else 4 * math.prod(header.shape))
            for _, header, size in plan
        )
        if not backward:
            return held + forward_bytes(self.span, batch, tokens)
        return held + backward_bytes(self.span, blocks, batch, tokens, 0)

    def _keep_bytes(self, held: int) -> int:
        """Of autograd graphs, for one backward request that takes `held` bytes besides."""
        return max(0, min(self.config.work_bytes // 8, self.work.max_peer_bytes - held))

    async def _compute_training(
        self,
        messages: Asker,
        request: pb.TrainingRequest,
        blocks: range,
        tensors: dict[str, Tensor],
        keep_bytes: int,
    ) -> Timed[_Trained]:
        """The whole request, piece by piece; between two of them others' steps have their turn."""
        given = Sequences(
            blocks,
            tensors.pop("hidden").to(self.span.dtype),
            tensors.get("attention_mask"),
            tensors.get("prompts"),
            decode_lora(request.lora, tensors) or request.adapter or None,
        )
        grad = tensors.pop("grad_output", None)
        work: ForwardPass | BackwardPass
        if grad is None:
            priority, work = Priority.FORWARD, ForwardPass(self.span, given)
        else:
            priority, work = Priority.BACKWARD, BackwardPass(self.span, given, grad, keep_bytes)
        pace = self._paces.setdefault(priority, Pace())
        queue_s = compute_s = 0.0
        pieces: Pieces | None = None
        while True:
            units = pace.units(self.lane.slice_s())
            step: Callable[[], int]
            if pieces is None:
                pieces = work.pieces(units)
                step = partial(next, pieces, 0)
            else:
                step = partial(_next_piece, pieces, units)
            self._check_wanted(messages)
            done = await self.lane.submit(priority, step, peer_id=messages.remote_peer, cost=units / len(blocks))
            queue_s, compute_s = queue_s + done.queue_s, compute_s + done.compute_s
            if not done.value:
                break
            pace.note(done.value, done.compute_s)
        if isinstance(work, ForwardPass):
            return Timed(_Trained(work.output), queue_s, compute_s)
        return Timed(_Trained(work.hidden, work.prompts, work.factors), queue_s, compute_s)


def _next_piece(pieces: Pieces, units: int) -> int:
    """Compute the next piece, in the compute thread; how much it was, 0 at the end."""
    try:
        return pieces.send(units)
    except StopIteration:
        return 0


class Pace:
    """How many token-blocks are computed in a time, learned from the pieces before."""

    def __init__(self) -> None:
        self._seconds_per_unit = 0.0
        self._last = FIRST_UNITS

    def units(self, seconds: float) -> int:
        """What should take so long; at most some times more than the last piece."""
        if not self._seconds_per_unit:
            return FIRST_UNITS
        return max(1, min(GROWTH * self._last, int(seconds / self._seconds_per_unit)))

    def note(self, units: int, seconds: float) -> None:
        """A piece of so many took so long."""
        per_unit = seconds / units
        old = self._seconds_per_unit
        self._seconds_per_unit = per_unit if not old else 0.6 * old + 0.4 * per_unit
        self._last = max(units, FIRST_UNITS)
