"""Blocks that a client computes itself, behind the door that all servers have.

The same code answers that answers others, reached over streams in memory and by no network: sessions, fail-over and
training treat such blocks as one more server. Its name is no peer ID, so nobody else can be meant by it, and nobody can
push to it or be pushed to by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import trio

from petals.models.blocks.block import BlockSpan
from petals.models.source.checkpoint import Checkpoint
from petals.models.source.loading import load_span
from petals.peer.base.config import ServeConfig
from petals.peer.base.identity import signer_of
from petals.peer.client.routing.routing import RouteHop
from petals.peer.engine.admission import Admission
from petals.peer.engine.cache_budget import CacheBudget
from petals.peer.engine.compute_thread import ComputeThread
from petals.peer.engine.endpoint import Inbound
from petals.peer.engine.push_sender import Pusher
from petals.peer.engine.quotas import Rates
from petals.peer.engine.scheduler import Lane
from petals.peer.engine.throughput import Speedometer, Throughput
from petals.peer.net.host import Handler, Host
from petals.protocols.errors import RequestRefused, UserError
from petals.protocols.inference import INFERENCE_V1
from petals.protocols.stream import ByteStream
from petals.protocols.training import BACKWARD_V1, FORWARD_V1
from petals.protocols.types import ModelId, PeerId

if TYPE_CHECKING:
    from trio_typing import TaskStatus

_AT_HOME = "@home"


def name_of(blocks: range, variant: str = "") -> PeerId:
    """What stands for a peer ID where these blocks are computed at home."""
    return PeerId(f"{blocks.start}:{blocks.stop}{variant}{_AT_HOME}")


def is_home(peer_id: PeerId) -> bool:
    """Whether that is no peer, but we ourselves."""
    return peer_id.endswith(_AT_HOME)


def leg_of(blocks: range, kept: range) -> RouteHop:
    """Some of the blocks that are `kept` at home, as a part of a route."""
    return RouteHop(name_of(kept), (), blocks, 0.0, 0.0, 0.0)


def check_local(local: Sequence[range], num_blocks: int) -> None:
    """Raise UserError unless these are ranges of the model's blocks, none twice."""
    seen: set[int] = set()
    for blocks in local:
        if not 0 <= blocks.start < blocks.stop <= num_blocks:
            raise UserError(
                f"local_blocks {blocks.start}:{blocks.stop}: the model has blocks 0:{num_blocks}, half-open"
            )
        if seen & set(blocks):
            raise UserError(f"local_blocks {blocks.start}:{blocks.stop} are named twice")
        seen |= set(blocks)


def split(blocks: range, local: Sequence[range]) -> list[tuple[range, range | None]]:
    """`blocks` cut into runs, in order, each with the local range that it is in; None: it goes to others."""
    runs: list[tuple[range, range | None]] = []
    at = blocks.start
    for kept in sorted(local, key=lambda each: each.start):
        start, stop = max(kept.start, at), min(kept.stop, blocks.stop)
        if start >= stop:
            continue
        if at < start:
            runs.append((range(at, start), None))
        runs.append((range(start, stop), kept))
        at = stop
    if at < blocks.stop:
        runs.append((range(at, blocks.stop), None))
    return runs


class Home:
    """Opens streams: to blocks at home, or else to other peers. `run` must be running before the former."""

    def __init__(self, host: Host, checkpoint: Checkpoint, model: ModelId, say: Callable[[str], None]) -> None:
        self._host = host
        self._checkpoint = checkpoint
        self._model = model
        self._say = say
        self._thread = ComputeThread()
        self._lane = Lane(thread=self._thread)
        self._loading = trio.Lock()
        self._doors: dict[PeerId, Inbound] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compute until cancelled."""
        async with self._thread.running(), trio.open_nursery() as nursery:
            nursery.start_soon(self._lane.run)
            self._nursery = nursery
            task_status.started()

    async def hold(self, name: PeerId, blocks: range, dtype: torch.dtype, quant_type: str = "none") -> None:
        """Load blocks, once, and answer about them under `name`.

        Raises:
            ModelError: they cannot be loaded.
        """
        async with self._loading:
            if name not in self._doors:
                self._say(f"loading blocks {blocks.start}:{blocks.stop} of {self._checkpoint.name} for ourselves")
                load = partial(load_span, self._checkpoint, blocks, dtype=dtype, quant_type=quant_type)
                self._doors[name] = self._open(await self._thread.run(load))

    def _open(self, span: BlockSpan) -> Inbound:
        assert self._nursery is not None  # `run` is running
        config = ServeConfig(work_bytes=1 << 50)  # it is our own work
        speed = Speedometer(Throughput(0.0, 0.0), fixed=True)
        budget = CacheBudget(config.cache_bytes)
        admission = Admission(self._host.peer_id, self._model.digest, verify=signer_of, clock=time.time)
        rates = Rates(None, None, frozenset(), trio.current_time)
        pusher = Pusher(self._host)
        inbound = Inbound(self._model, span, self._lane, budget, config, admission, rates, speed=speed, pusher=pusher)
        if inbound.prefixes is not None:
            self._nursery.start_soon(inbound.prefixes.run)
        return inbound

    def has_better_way(self, stream: ByteStream) -> bool:
        """As `Host.has_better_way`; there is none home."""
        return self._host.has_better_way(stream)

    def link(self, peer_id: PeerId) -> str:
        """As `Host.link`; "" for a name of ours."""
        return "" if is_home(peer_id) else self._host.link(peer_id)

    async def open_stream(self, peer_id: PeerId, protocol: str, *, addrs: Sequence[str] = ()) -> ByteStream:
        """As `Host.open_stream`; a name of ours never leads to the network."""
        if not is_home(peer_id):
            return await self._host.open_stream(peer_id, protocol, addrs=addrs)
        await trio.lowlevel.checkpoint()
        inbound = self._doors.get(peer_id)
        if inbound is None:
            raise RequestRefused(f"blocks {peer_id} are not loaded", peer_id)
        handlers: dict[str, Handler] = {
            INFERENCE_V1: inbound.answer_inference,
            FORWARD_V1: partial(inbound.answer_training, backward=False),
            BACKWARD_V1: partial(inbound.answer_training, backward=True),
        }
        return self._host.loop_back(peer_id, protocol, handlers[protocol])
