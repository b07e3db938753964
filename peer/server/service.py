"""A server's life: choose, load, accept, announce, drain - in this order, in one nursery."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import trio

from petals import __version__
from petals.dht.directory import Directory
from petals.dht.records import ServerRecord, ServerState
from petals.models.adapters import load_lora
from petals.models.block import BlockSpan
from petals.models.checkpoint import Checkpoint
from petals.models.loading import load_span
from petals.peer.config import ServeConfig
from petals.peer.host import Host
from petals.peer.server.announcer import Announcer
from petals.peer.server.inbound import Inbound
from petals.peer.server.lane import Lane, Priority
from petals.peer.server.leases import CacheBudget
from petals.peer.server.throughput import Throughput, measure_throughput
from petals.protocols.errors import UserError
from petals.protocols.inference import INFERENCE_V1
from petals.protocols.tensors import FLOATS_BY_NAME
from petals.protocols.training import BACKWARD_V1, FORWARD_V1
from petals.protocols.types import ModelId

if TYPE_CHECKING:
    from trio_typing import TaskStatus

log = logging.getLogger(__name__)

GOODBYE_S = 2.0
"""How long leaving may take to tell the swarm."""


@dataclass(frozen=True)
class Server:
    """A server that answers: streams are accepted and the swarm knows it."""

    model: ModelId
    span: BlockSpan
    inbound: Inbound
    budget: CacheBudget
    lane: Lane
    announcer: Announcer
    throughput: Throughput


def compute_dtype(config: ServeConfig, checkpoint: Checkpoint) -> torch.dtype:
    """float32 on a CPU unless asked otherwise: exact, and the fastest product there; the checkpoint's own on a GPU."""
    if config.dtype == "auto":
        return torch.float32 if device_of(config).type == "cpu" else checkpoint.dtype
    if config.dtype not in FLOATS_BY_NAME:
        raise UserError(f"unknown dtype {config.dtype!r}: choose auto, {', '.join(FLOATS_BY_NAME)}")
    return FLOATS_BY_NAME[config.dtype]


def device_of(config: ServeConfig) -> torch.device:
    """The device to compute on."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(config.device)
    except RuntimeError:
        raise UserError(f"unknown device {config.device!r}: choose auto, cpu or cuda:0") from None


def check_blocks(blocks: range, checkpoint: Checkpoint) -> range:
    """A half-open range within the model.

    Raises:
        UserError: with the range that would be right.
    """
    if not 0 <= blocks.start < blocks.stop <= checkpoint.num_blocks:
        raise UserError(
            f"{checkpoint.name} has blocks 0:{checkpoint.num_blocks}; "
            f"{blocks.start}:{blocks.stop} is not a range within them"
        )
    return blocks


async def serve(
    host: Host,
    directory: Directory,
    checkpoint: Checkpoint,
    blocks: range,
    config: ServeConfig,
    progress: Callable[[str], None],
    *,
    task_status: TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `blocks` until cancelled. Started: streams are answered, and only then the swarm is told ONLINE."""
    dtype, device = compute_dtype(config, checkpoint), device_of(config)
    model = ModelId(checkpoint.name, await trio.to_thread.run_sync(lambda: checkpoint.digest))
    progress(f"loading blocks {blocks.start}:{blocks.stop} of {checkpoint.name} ({str(dtype).removeprefix('torch.')})")
    span = await trio.to_thread.run_sync(
        partial(load_span, checkpoint, blocks, dtype=dtype, device=str(device), quant_type=config.quant_type)
    )
    for adapter in config.adapters:
        span.add_adapter(await trio.to_thread.run_sync(load_lora, adapter, span))
    lane = Lane()
    budget = CacheBudget(config.cache_bytes, max_share=config.max_peer_share)
    inbound = Inbound(model, span, lane, budget, config)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.run)
        measured = await _throughput(lane, span, config)
        announcer = Announcer(directory, partial(_describe, host, inbound, measured, config), config.announce_s)
        host.set_handler(INFERENCE_V1, inbound.answer_inference)
        host.set_handler(FORWARD_V1, partial(inbound.answer_training, backward=False))
        host.set_handler(BACKWARD_V1, partial(inbound.answer_training, backward=True))
        try:
            await announcer.enter(ServerState.ONLINE)
            nursery.start_soon(announcer.run)
            progress(
                f"serving blocks {blocks.start}:{blocks.stop}, {span.weight_bytes / 1e6:,.0f} MB of weights, "
                f"{config.cache_bytes / 1e6:,.0f} MB of cache, {measured.inference_rps:,.0f} blocks/s"
            )
            task_status.started(Server(model, span, inbound, budget, lane, announcer, measured))
            await trio.sleep_forever()
        finally:
            inbound.leaving = True
            await announcer.leave(GOODBYE_S)
            for protocol in (INFERENCE_V1, FORWARD_V1, BACKWARD_V1):
                host.remove_handler(protocol)


async def _throughput(lane: Lane, span: BlockSpan, config: ServeConfig) -> Throughput:
    if config.throughput is not None:
        return Throughput(config.throughput, config.throughput)
    return (await lane.submit(Priority.DECODE, partial(measure_throughput, span))).value


def _describe(host: Host, inbound: Inbound, measured: Throughput, config: ServeConfig) -> ServerRecord:
    span = inbound.span
    per_token = max(1, span.cache_bytes(span.blocks, 1, 1))
    return ServerRecord(
        model=inbound.model,
        peer_id=host.peer_id,
        blocks=span.blocks,
        state=ServerState.ONLINE,
        addrs=host.addrs,
        version=__version__,
        public_name=config.public_name,
        dtype=str(span.dtype).removeprefix("torch."),
        quant_type=span.quant_type,
        adapters=span.adapters,
        inference_rps=measured.inference_rps,
        forward_rps=measured.forward_rps,
        cache_tokens_left=inbound.budget.left_bytes // per_token,
        sequence=0,
        issued_at=0.0,
        expires_at=0.0,
    )
