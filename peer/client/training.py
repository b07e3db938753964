"""Forward and backward through the swarm, for training: spans in a row, micro-batches side by side.

A server keeps nothing between forward and backward. The client keeps the input of every span, so that a span whose
server is lost is computed again elsewhere, alone, and with the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from petals.models.blocks.adapters import Lora
from petals.peer.accounting.ledger import nobody_counts
from petals.peer.base.concurrency import gather
from petals.peer.base.config import Timeouts
from petals.peer.client.hops.hop import answer_within, error_of, read_reply, read_tensor
from petals.peer.client.routing.local_blocks import Home
from petals.peer.client.routing.routing import Route, RouteHop
from petals.peer.client.routing.view import SwarmWatcher
from petals.peer.engine.lora_codec import encode_lora
from petals.peer.net.host import Host
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import (
    LocalProtocolError,
    NeverFits,
    RemoteError,
    RemoteProtocolError,
    RouteError,
    SwarmError,
)
from petals.protocols.inference import MAX_MESSAGE_BYTES
from petals.protocols.receipts import BACKWARD, block_tokens
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """What goes through `blocks` beside the hidden states, and stays the same from forward to backward."""

    blocks: range
    attention_mask: Tensor | None = None
    """(batch, tokens) bool"""
    prompts: Tensor | None = None
    """(len(blocks), batch, prefix, hidden_size)"""
    lora: Lora | None = None

    def rows(self, rows: slice) -> Companions:
        """Of some rows of the batch."""
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        prompts = None if self.prompts is None else self.prompts[:, rows]
        return replace(self, attention_mask=mask, prompts=prompts)

    def of(self, blocks: range) -> Companions:
        """Of a sub-range of the blocks."""
        start = self.blocks.start
        prompts = None if self.prompts is None else self.prompts[blocks.start - start : blocks.stop - start]
        lora = None if self.lora is None else self.lora.of(blocks)
        return replace(self, blocks=blocks, prompts=prompts, lora=lora)


@dataclass(slots=True)
class Gradients:
    """Of one batch, or of one span of it."""

    hidden: Tensor
    prompts: Tensor | None = None
    """As `Companions.prompts`."""
    lora: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    """(block, path) -> gradients of A and B, in the order of `Lora.layers`."""


@dataclass(frozen=True, slots=True)
class BatchTrainer:
    """Runs whole batches through `blocks` of a model.

    Args:
        find_route: (blocks, peers to avoid) -> Route; asked anew for each micro-batch, so that load spreads.
    """

    host: Host | Home
    watcher: SwarmWatcher
    model: ModelId
    timeouts: Timeouts
    find_route: Callable[[range, frozenset[PeerId]], Route]
    adapter: str = ""
    encoding: pb.Encoding = pb.RAW
    max_retries: float = 10
    took: Callable[[PeerId, int], None] = nobody_counts
    """Told who did how many block-tokens of work for us."""

    async def forward(self, hidden: Tensor, companions: Companions) -> tuple[Tensor, list[list[SpanInput]]]:
        """All rows through all blocks.

        Args:
            hidden: (batch, tokens, hidden_size), CPU.
        Returns: the output, and per micro-batch the inputs of its spans, which `backward` takes.
        Raises:
            MissingBlocks, RemoteError: after `max_retries` failures of one span.
        """
        calls = [partial(self._forward_rows, hidden[rows], companions.rows(rows)) for rows in _split(hidden)]
        results = _unwrap(await gather(calls))
        return torch.cat([output for output, _ in results]), [spans for _, spans in results]

    async def backward(self, grad_output: Tensor, spans: list[list[SpanInput]], companions: Companions) -> Gradients:
        """Gradients with respect to all that `forward` was given."""
        calls = [
            partial(self._backward_rows, grad_output[rows], inputs, companions.rows(rows))
            for rows, inputs in zip(_split(grad_output), spans, strict=True)
        ]
        results = _unwrap(await gather(calls))
        total = Gradients(torch.cat([each.hidden for each in results]))
        if companions.prompts is not None:
            total.prompts = torch.cat([each.prompts for each in results if each.prompts is not None], dim=1)
        for place in results[0].lora:
            total.lora[place] = [
                torch.stack(each).sum(0) for each in zip(*(r.lora[place] for r in results), strict=True)
            ]
        return total

    async def _forward_rows(self, hidden: Tensor, companions: Companions) -> tuple[Tensor, list[SpanInput]]:
        spans: list[SpanInput] = []
        position, failures, avoid = companions.blocks.start, 0, frozenset[PeerId]()
        route: list[RouteHop] = []
        while position < companions.blocks.stop:
            if not route:
                route = list(await self._route(range(position, companions.blocks.stop), avoid))
            leg = route.pop(0)
            try:
                output = (await self._ask(leg, hidden, companions.of(leg.blocks), None)).hidden
            except RemoteError as error:
                avoid, route = avoid | {leg.peer_id}, []
                failures = self._count_failure(leg, error, failures, avoid)
                continue
            spans.append(SpanInput(leg.blocks, hidden))
            hidden = output.to(hidden.dtype)
            position = leg.blocks.stop
        return hidden, spans

    async def _backward_rows(self, grad: Tensor, spans: list[SpanInput], companions: Companions) -> Gradients:
        todo = list(spans)
        done: list[Gradients] = []
        failures, avoid = 0, frozenset[PeerId]()
        while todo:
            span = todo.pop()
            legs = list(await self._route(span.blocks, avoid))
            if len(legs) > 1:  # the server that held the whole span is gone: cut the span like the new route
                _, finer = await self._forward_rows(span.hidden, companions.of(span.blocks))
                if len(finer) > 1:
                    todo += finer
                    continue
                legs = list(await self._route(finer[0].blocks, avoid))
                if len(legs) > 1:
                    todo.append(span)
                    continue
            leg = legs[0]
            try:
                done.insert(0, await self._ask(leg, span.hidden, companions.of(leg.blocks), grad))
            except RemoteError as error:
                avoid |= {leg.peer_id}
                failures = self._count_failure(leg, error, failures, avoid)
                todo.append(span)
                continue
            grad = done[0].hidden
        prompts = [each.prompts for each in done if each.prompts is not None]
        lora = {place: factors for each in done for place, factors in each.lora.items()}
        return Gradients(grad, torch.cat(prompts) if prompts else None, lora)

    def _count_failure(self, leg: RouteHop, error: RemoteError, failures: int, avoid: frozenset[PeerId]) -> int:
        self.watcher.report(leg.peer_id, error)
        if failures >= self.max_retries:
            raise error
        if isinstance(error, NeverFits):  # another server may have more room; waiting is of no use
            try:
                self.find_route(leg.blocks, avoid)
            except RouteError:
                raise error from None
        log.warning("blocks %d:%d: %s; asking somebody else", leg.blocks.start, leg.blocks.stop, error)
        return failures + 1

    async def _route(self, blocks: range, avoid: frozenset[PeerId]) -> tuple[RouteHop, ...]:
        return (await self.watcher.route(self.find_route, blocks, avoid, self.timeouts.route_s)).hops

    async def _ask(self, leg: RouteHop, hidden: Tensor, companions: Companions, grad: Tensor | None) -> Gradients:
        """Forward (no `grad`): `hidden` of the result is the output. Backward: the gradients."""
        request, payload = self._request(hidden, companions, grad)
        protocol = FORWARD_V1 if grad is None else BACKWARD_V1
        with answer_within(self.timeouts.training_s, leg.peer_id):
            stream = await self.host.open_stream(leg.peer_id, protocol, addrs=leg.addrs)
            messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
            try:
                await messages.write_message(request.SerializeToString(), *payload)
                reply = pb.TrainingReply()
                await read_reply(messages, reply)
                if reply.WhichOneof("kind") != "done":
                    raise _refusal(reply, leg.peer_id)
                answer = Gradients(await read_tensor(messages, reply.done.hidden, tuple(hidden.shape), "hidden"))
                if grad is not None:
                    await _read_gradients(messages, reply.done, companions, answer)
                await messages.close()
            except BaseException:
                await messages.reset()
                raise
        work = block_tokens(len(leg.blocks), *hidden.shape[:2])
        self.took(leg.peer_id, work if grad is None else work * BACKWARD)
        return answer

    def _request(
        self, hidden: Tensor, companions: Companions, grad: Tensor | None
    ) -> tuple[pb.TrainingRequest, list[memoryview]]:
        request = pb.TrainingRequest(
            model_digest=self.model.digest,
            start_block=companions.blocks.start,
            end_block=companions.blocks.stop,
            adapter=self.adapter,
            reply_encoding=self.encoding,
        )
        payload: list[memoryview] = []
        for name, tensor, encoding in (
            ("hidden", hidden, self.encoding),
            ("attention_mask", companions.attention_mask, pb.RAW),
            ("prompts", companions.prompts, self.encoding),
            ("grad_output", grad, self.encoding),
        ):
            if tensor is not None:
                header, pieces = encode_tensor(tensor, encoding)
                getattr(request, name).CopyFrom(header)
                payload += pieces
        layers, pieces = encode_lora(companions.lora, companions.blocks)
        request.lora.extend(layers)
        return request, payload + pieces


async def _read_gradients(
    messages: MessageStream, done: pb.TrainingDone, companions: Companions, answer: Gradients
) -> None:
    """Read what follows the gradient of the input, into `answer`."""
    if companions.prompts is not None:
        answer.prompts = await read_tensor(messages, done.prompts, tuple(companions.prompts.shape), "prompts")
    if companions.lora is None:
        return
    factors = companions.lora.factors()
    if len(done.lora) != len(factors):
        raise RemoteProtocolError(f"{len(done.lora)} gradients for {len(factors)} factors", messages.remote_peer)
    read = [
        await read_tensor(messages, header, tuple(factor.shape), "lora")
        for header, factor in zip(done.lora, factors, strict=True)
    ]
    for index, place in enumerate(companions.lora.layers):
        answer.lora[place] = read[2 * index : 2 * index + 2]


def _refusal(reply: pb.TrainingReply, peer_id: PeerId) -> RemoteError | LocalProtocolError:
    if reply.WhichOneof("kind") == "error":
        return error_of(reply.error, peer_id)
    return RemoteProtocolError("an empty reply", peer_id)


def _split(hidden: Tensor) -> list[slice]:
    rows = max(1, MICRO_BATCH_TOKENS // hidden.shape[1])
    return [slice(start, start + rows) for start in range(0, hidden.shape[0], rows)]


def _unwrap(results: list[T | SwarmError]) -> list[T]:
    values: list[T] = []
    for result in results:
        if isinstance(result, SwarmError):
            raise result
        values.append(result)
    return values
