"""Forward and backward through the swarm, for training: spans in a row, micro-batches side by side.

A server keeps nothing between forward and backward. The client keeps the input of every span, so that a span whose
server is lost is computed again elsewhere, alone, and with the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from petals.peer.client.hop import answer_within, error_of, read_reply, read_tensor
from petals.peer.client.routing import Route, RouteHop
from petals.peer.client.view import SwarmWatcher
from petals.peer.concurrency import gather
from petals.peer.config import Timeouts
from petals.peer.host import Host
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import LocalProtocolError, RemoteError, RemoteProtocolError, SwarmError
from petals.protocols.inference import MAX_MESSAGE_BYTES
from petals.protocols.stream import MessageStream
from petals.protocols.tensors import encode_tensor
from petals.protocols.training import BACKWARD_V1, FORWARD_V1
from petals.protocols.types import ModelId, PeerId

T = TypeVar("T")
log = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = 1024
"""Rows are grouped so that a request carries about this many tokens: small enough to keep several servers busy at
once, large enough that a request's fixed cost does not show."""


@dataclass(frozen=True, slots=True)
class SpanInput:
    """What one span was given in a forward pass; enough to run its backward pass anywhere."""

    blocks: range
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class BatchTrainer:
    """Runs whole batches through `blocks` of a model.

    Args:
        find_route: (blocks, peers to avoid) -> Route; asked anew for each micro-batch, so that load spreads.
    """

    host: Host
    watcher: SwarmWatcher
    model: ModelId
    timeouts: Timeouts
    find_route: Callable[[range, frozenset[PeerId]], Route]
    adapter: str = ""
    encoding: pb.Encoding = pb.RAW
    max_retries: int = 10

    async def forward(
        self, hidden: Tensor, blocks: range, attention_mask: Tensor | None, prompts: Tensor | None
    ) -> tuple[Tensor, list[list[SpanInput]]]:
        """All rows through all blocks.

        Args:
            hidden: (batch, tokens, hidden_size), CPU. attention_mask: (batch, tokens) bool.
            prompts: (len(blocks), batch, prefix, hidden_size).
        Returns: the output, and per micro-batch the inputs of its spans, which `backward` takes.
        Raises:
            MissingBlocks, RemoteError: after `max_retries` failures of one span.
        """
        parts = _split(hidden)
        calls = [
            partial(self._forward_rows, hidden[rows], blocks, _rows(attention_mask, rows), _prompt_rows(prompts, rows))
            for rows in parts
        ]
        results = _unwrap(await gather(calls))
        return torch.cat([output for output, _ in results]), [spans for _, spans in results]

    async def backward(
        self,
        grad_output: Tensor,
        spans: list[list[SpanInput]],
        blocks: range,
        attention_mask: Tensor | None,
        prompts: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients with respect to the input (batch, tokens, hidden_size) and the prompts of `forward`."""
        parts = _split(grad_output)
        calls = [
            partial(
                self._backward_rows,
                grad_output[rows],
                inputs,
                blocks,
                _rows(attention_mask, rows),
                _prompt_rows(prompts, rows),
            )
            for rows, inputs in zip(parts, spans, strict=True)
        ]
        results = _unwrap(await gather(calls))
        grad_prompts = None
        if prompts is not None:
            grad_prompts = torch.cat([grad for _, grad in results if grad is not None], dim=1)
        return torch.cat([grad for grad, _ in results]), grad_prompts

    async def _forward_rows(
        self, hidden: Tensor, blocks: range, mask: Tensor | None, prompts: Tensor | None
    ) -> tuple[Tensor, list[SpanInput]]:
        spans: list[SpanInput] = []
        position, failures, avoid = blocks.start, 0, frozenset[PeerId]()
        route: list[RouteHop] = []
        while position < blocks.stop:
            if not route:
                route = list(await self._route(range(position, blocks.stop), avoid))
            leg = route.pop(0)
            try:
                span_prompts = _prompt_blocks(prompts, blocks, leg.blocks)
                output, _ = await self._ask(leg, FORWARD_V1, hidden, mask, span_prompts, None)
            except RemoteError as error:
                failures, avoid, route = self._count_failure(leg, error, failures), avoid | {leg.peer_id}, []
                continue
            spans.append(SpanInput(leg.blocks, hidden))
            hidden = output.to(hidden.dtype)
            position = leg.blocks.stop
        return hidden, spans

    async def _backward_rows(
        self, grad: Tensor, spans: list[SpanInput], blocks: range, mask: Tensor | None, prompts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        todo = list(spans)
        grad_prompts: list[Tensor] = []
        failures, avoid = 0, frozenset[PeerId]()
        while todo:
            span = todo.pop()
            legs = list(await self._route(span.blocks, avoid))
            if len(legs) > 1:  # the server that held the whole span is gone: cut the span like the new route
                _, finer = await self._forward_rows(
                    span.hidden, span.blocks, mask, _prompt_blocks(prompts, blocks, span.blocks)
                )
                if len(finer) > 1:
                    todo += finer
                    continue
                legs = list(await self._route(finer[0].blocks, avoid))
                if len(legs) > 1:
                    todo.append(span)
                    continue
            leg = legs[0]
            try:
                span_prompts = _prompt_blocks(prompts, blocks, leg.blocks)
                grad, grad_span = await self._ask(leg, BACKWARD_V1, span.hidden, mask, span_prompts, grad)
            except RemoteError as error:
                failures, avoid = self._count_failure(leg, error, failures), avoid | {leg.peer_id}
                todo.append(span)
                continue
            if grad_span is not None:
                grad_prompts.insert(0, grad_span)
        return grad, torch.cat(grad_prompts) if grad_prompts else None

    def _count_failure(self, leg: RouteHop, error: RemoteError, failures: int) -> int:
        self.watcher.report(leg.peer_id, error)
        if failures >= self.max_retries:
            raise error
        log.warning("blocks %d:%d: %s; asking somebody else", leg.blocks.start, leg.blocks.stop, error)
        return failures + 1

    async def _route(self, blocks: range, avoid: frozenset[PeerId]) -> tuple[RouteHop, ...]:
        return (await self.watcher.route(self.find_route, blocks, avoid, self.timeouts.route_s)).hops

    async def _ask(
        self,
        leg: RouteHop,
        protocol: str,
        hidden: Tensor,
        mask: Tensor | None,
        prompts: Tensor | None,
        grad_output: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        request = pb.TrainingRequest(
            model_digest=self.model.digest,
            start_block=leg.blocks.start,
            end_block=leg.blocks.stop,
            adapter=self.adapter,
            reply_encoding=self.encoding,
        )
        payload: list[memoryview] = []
        for name, tensor, encoding in (
            ("hidden", hidden, self.encoding),
            ("attention_mask", mask, pb.RAW),
            ("prompts", prompts, self.encoding),
            ("grad_output", grad_output, self.encoding),
        ):
            if tensor is not None:
                header, pieces = encode_tensor(tensor, encoding)
                getattr(request, name).CopyFrom(header)
                payload += pieces
        with answer_within(self.timeouts.training_s, leg.peer_id):
            stream = await self.host.open_stream(leg.peer_id, protocol, addrs=leg.addrs)
            messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
            try:
                await messages.write_message(request.SerializeToString(), *payload)
                reply = pb.TrainingReply()
                await read_reply(messages, reply)
                if reply.WhichOneof("kind") != "done":
                    raise _refusal(reply, leg.peer_id)
                answer = await read_tensor(messages, reply.done.hidden, tuple(hidden.shape), "hidden")
                grad_prompts = None
                if grad_output is not None and prompts is not None:
                    grad_prompts = await read_tensor(messages, reply.done.prompts, tuple(prompts.shape), "prompts")
                await messages.close()
            except BaseException:
                await messages.reset()
                raise
        return answer, grad_prompts


def _refusal(reply: pb.TrainingReply, peer_id: PeerId) -> RemoteError | LocalProtocolError:
    if reply.WhichOneof("kind") == "error":
        return error_of(reply.error, peer_id)
    return RemoteProtocolError("an empty reply", peer_id)


def _split(hidden: Tensor) -> list[slice]:
    rows = max(1, MICRO_BATCH_TOKENS // hidden.shape[1])
    return [slice(start, start + rows) for start in range(0, hidden.shape[0], rows)]


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _prompt_rows(prompts: Tensor | None, rows: slice) -> Tensor | None:
    return None if prompts is None else prompts[:, rows]


def _prompt_blocks(prompts: Tensor | None, held: range, wanted: range) -> Tensor | None:
    return None if prompts is None else prompts[wanted.start - held.start : wanted.stop - held.start]


def _unwrap(results: list[T | SwarmError]) -> list[T]:
    values: list[T] = []
    for result in results:
        if isinstance(result, SwarmError):
            raise result
        values.append(result)
    return values
