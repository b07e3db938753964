"""Forward and backward requests: one accepted stream each, nothing kept in between."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from petals.models.adapters import Lora
from petals.peer.lora import decode_lora
from petals.peer.server.guard import Adapter, Asker, Guard, Refused, parse
from petals.peer.server.lane import Priority
from petals.protocols import messages_pb2 as pb
from petals.protocols.inference import check_model
from petals.protocols.receipts import BACKWARD, block_tokens
from petals.protocols.stream import ByteStream
from petals.protocols.tensors import encode_tensor
from petals.protocols.training import request_payload


@dataclass(frozen=True, slots=True)
class _Trained:
    """What comes out of a training request: forward the output, backward the gradients."""

    hidden: Tensor
    prompts: Tensor | None = None
    lora: Sequence[Tensor] = ()
    """Of A and B of each layer, in order."""


class Trainings(Guard):
    """Answers `/petals/forward` and `/petals/backward`."""

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
        lora_bytes = self._lora_bytes([entry for entry in plan if entry[0].startswith("lora.")])
        peer_id, wait_s = messages.remote_peer, self.config.max_wait_s
        await self._turn(peer_id, tokens, plan)
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
        done_work = block_tokens(len(blocks), request.hidden.shape[0], request.hidden.shape[1])
        self.gave(peer_id, done_work * BACKWARD if backward else done_work)
        self._charge(peer_id, -1)

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
