"""A server's life: choose, load, accept, announce, drain - in this order, in one nursery; and again after a move."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from petals import __version__
from petals.dht.directory import Directory, Signer
from petals.dht.records import ServerRecord, ServerState
from petals.models.blocks.adapters import load_lora
from petals.models.blocks.block import BlockSpan
from petals.models.blocks.passes import PASS_ROWS
from petals.models.errors import ModelError
from petals.models.source.checkpoint import Checkpoint
from petals.models.source.loading import load_span, share_layers
from petals.peer.accounting.ledger import Ledger
from petals.peer.base.config import ServeConfig
from petals.peer.base.identity import signer_of
from petals.peer.engine.admission import Admission
from petals.peer.engine.cache_budget import CacheBudget
from petals.peer.engine.compute_thread import ComputeThread
from petals.peer.engine.endpoint import Inbound
from petals.peer.engine.push_sender import Pusher
from petals.peer.engine.quotas import Rates
from petals.peer.engine.scheduler import Lane, Priority, all_alike
from petals.peer.engine.throughput import Speedometer, Throughput, measure_throughput
from petals.peer.membership.reachability import Reach
from petals.peer.net.host import Handler, Host
from petals.peer.server.announcer import Announcer
from petals.peer.server.capacity import room_to_train
from petals.peer.server.device import compute_dtype, device_of
from petals.peer.server.memory import leasable_bytes
from petals.peer.server.next_hops import Neighbours
from petals.peer.server.placement import may_leave, should_move
from petals.protocols.admit import ADMIT_V1
from petals.protocols.errors import SwarmError, UserError
from petals.protocols.inference import INFERENCE_V1
from petals.protocols.push import PUSH_V1
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
    speed: Speedometer


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


class Service:
    """Serves one model until cancelled. `server` is what answers now, None while loading.

    Args:
        dice: uniform numbers in [0, 1), for the pauses between looks at the swarm.
        ledger: where what is given is written down.
        prepare: brings the weights of blocks to this disk, before they are loaded.
        signer: signs answers; None: they are not signed.
    """

    def __init__(
        self,
        host: Host,
        directory: Directory,
        checkpoint: Checkpoint,
        model: ModelId,
        config: ServeConfig,
        progress: Callable[[str], None],
        dice: Callable[[], float],
        prepare: Callable[[range], Awaitable[None]],
        ledger: Ledger,
        signer: Signer | None = None,
    ) -> None:
        self.admission = Admission(
            host.peer_id,
            model.digest,
            allowed=config.allowed,
            invited_by=config.invited_by,
            verify=signer_of,
            clock=time.time,
            charge=host.charge,
        )
        self.model = model
        self.server: Server | None = None
        self.reciprocal = config.priority == "reciprocal"
        self.announcer = Announcer(directory, self._describe, config.announce_s)
        self._host = host
        self._directory = directory
        self._checkpoint = checkpoint
        self._config = config
        self._progress = progress
        self._dice = dice
        self._rates = Rates(
            config.max_peer_tokens_s,
            config.max_peer_bytes_s,
            free=config.favoured | {host.peer_id},
            clock=trio.current_time,
        )
        self._prepare = prepare
        self._signer = signer
        self._ledger = ledger
        self._blocks = range(0)
        self._thread = ComputeThread()
        self._neighbours = Neighbours(host, directory, model, lambda: self._blocks, config.announce_s)

    async def run(self, blocks: range, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve `blocks`, and others later if the configuration leaves the choice to us. Started: streams are answered,
        and only then the swarm is told ONLINE."""
        self._blocks = blocks
        self._directory.namesake.say = self._progress
        if not self.admission.is_open:
            self._host.set_handler(ADMIT_V1, self.admission.answer)
        async with self._thread.running():
            await self._serve(task_status.started)

    async def _serve(self, started: Callable[[], None]) -> None:
        left: range | None = None
        try:
            while True:
                await self.announcer.enter(ServerState.JOINING)
                try:
                    await self._prepare(self._blocks)
                    span = await self._load(self._blocks)
                except (ModelError, UserError) as error:
                    if left is None:
                        raise
                    self._progress(f"{error}; going back to blocks {left.start}:{left.stop}")
                    self._blocks, left = left, None
                    continue
                left = self._blocks
                self._blocks = await self._stay(span, started)
                del span  # its memory is needed for the next one
                self._progress(f"moving to blocks {self._blocks.start}:{self._blocks.stop}, where the swarm is weaker")
                started = _nobody_waits
        finally:
            await self.announcer.leave(GOODBYE_S)

    async def _load(self, blocks: range) -> BlockSpan:
        config, checkpoint = self._config, self._checkpoint
        dtype, device = compute_dtype(config, checkpoint), device_of(config)
        name = str(dtype).removeprefix("torch.")
        self._progress(f"loading blocks {blocks.start}:{blocks.stop} of {checkpoint.name} ({name})")
        load = partial(
            load_span,
            quant_type=config.quant_type,
            deterministic=config.deterministic,
            keep_transposed=room_to_train(checkpoint, config, blocks),
            progress=self._progress,
        )
        span = await self._thread.run(partial(load, checkpoint, blocks, dtype=dtype, device=str(device)))
        for adapter in config.adapters:
            span.add_adapter(await self._thread.run(partial(load_lora, adapter, span)))
        if config.adapters and span.lean and not config.deterministic:  # the lean way has no place for adapters
            await self._thread.run(partial(share_layers, span, checkpoint))
        return span

    async def _stay(self, span: BlockSpan, started: Callable[[], None]) -> range:
        """Answer about `span` until another place is clearly better; returns that, once no session is left here."""
        pass_rows = 0 if self._config.deterministic else PASS_ROWS
        weigh = self._ledger.weight if self.reciprocal else all_alike
        lane = Lane(self._config.favoured, pass_rows=pass_rows, thread=self._thread, weigh=weigh)
        tokens = self._config.cache_tokens
        budget = CacheBudget(
            self._config.cache_bytes if tokens is None else tokens * span.cache_bytes(span.blocks, 1, 1),
            max_share=self._config.max_peer_share,
            leasable_bytes=partial(leasable_bytes, device_of(self._config)),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lane.run)
            speed = await self._speed(lane, span)
            inbound = Inbound(
                self.model,
                span,
                lane,
                budget,
                self._config,
                self.admission,
                self._rates,
                gave=self._ledger.gave,
                charge=self._host.charge,
                speed=speed,
                pusher=Pusher(self._host),
                signer=self._signer,
            )
            self.server = server = Server(self.model, span, inbound, budget, lane, speed)
            handlers: dict[str, Handler] = {
                INFERENCE_V1: inbound.answer_inference,
                FORWARD_V1: partial(inbound.answer_training, backward=False),
                BACKWARD_V1: partial(inbound.answer_training, backward=True),
                PUSH_V1: inbound.answer_push,
            }
            for protocol, handler in handlers.items():
                self._host.set_handler(protocol, handler)
            try:
                await self.announcer.enter(ServerState.ONLINE)
                nursery.start_soon(self.announcer.run)
                nursery.start_soon(self._neighbours.run)
                if inbound.prefixes is not None:
                    nursery.start_soon(inbound.prefixes.run)
                self._progress(
                    f"serving blocks {span.blocks.start}:{span.blocks.stop}, {span.weight_bytes / 1e6:,.0f} MB of "
                    f"weights, {budget.total_bytes / 1e6:,.0f} MB of cache, "
                    f"{speed.throughput.inference_rps:,.0f} blocks/s"
                )
                started()
                place = await self._better_place(server)
                self.server = None
                nursery.cancel_scope.cancel()
                return place
            finally:
                inbound.leaving = True
                for protocol in handlers:
                    self._host.remove_handler(protocol)
        raise AssertionError("unreachable")  # the nursery was cancelled from inside, after `place` was known

    async def _speed(self, lane: Lane, span: BlockSpan) -> Speedometer:
        said = self._config.throughput
        if said is not None:
            return Speedometer(Throughput(said, said), fixed=True)
        return Speedometer((await lane.submit(Priority.DECODE, partial(measure_throughput, span))).value)

    async def _better_place(self, server: Server) -> range:
        """Wait until moving pays, and drain. Whoever was told which blocks to hold stays for ever."""
        if self._config.blocks is not None or self._config.balance_quality <= 0:
            await trio.sleep_forever()
        while True:
            await trio.sleep(-self._config.mean_balance_check_period * math.log(1 - self._dice()))
            if await self._look_around() is None:
                continue
            await self.announcer.enter(ServerState.DRAINING)
            server.inbound.leaving = True
            with trio.move_on_after(self._config.drain_s):
                await server.inbound.until_idle()
            # Others may have left meanwhile, or be on the point of moving too: they are seen as DRAINING by now.
            place = await self._look_around()
            if place is not None:
                await server.inbound.cut()
                return place
            server.inbound.leaving = False
            await self.announcer.enter(ServerState.ONLINE)

    async def _look_around(self) -> range | None:
        try:
            records = await self._directory.lookup(self.model)
        except SwarmError as error:
            log.info("no look around: %s", error)
            return None
        me, min_gain = self._host.peer_id, 1 - self._config.balance_quality
        place = should_move(records, me, self._checkpoint.num_blocks, len(self._blocks), min_gain=min_gain)
        return place if may_leave(records, me, self._blocks) else None

    def _describe(self) -> ServerRecord:
        """What is true now; while loading, what will be."""
        server, config = self.server, self._config
        span = None if server is None else server.span
        speed = Throughput(config.throughput or 0.0, config.throughput or 0.0)
        left = 0
        if server is not None:
            speed = server.speed.throughput
            left = server.budget.left_bytes // max(1, server.span.cache_bytes(server.span.blocks, 1, 1))
        return ServerRecord(
            model=self.model,
            peer_id=self._host.peer_id,
            blocks=self._blocks,
            num_blocks=self._checkpoint.num_blocks,
            state=self.announcer.state,
            addrs=self._host.addrs,
            version=__version__,
            public_name=config.public_name,
            dtype=str(compute_dtype(config, self._checkpoint)).removeprefix("torch."),
            quant_type=config.quant_type,
            adapters=() if span is None else span.adapters,
            inference_rps=speed.inference_rps,
            forward_rps=speed.forward_rps,
            queue_s=0.0 if server is None else server.lane.queue_s(),
            cache_tokens_left=left,
            using_relay=self._host.reach == Reach.RELAYED,
            reachability=self._host.reach,
            round_trips_s=self._neighbours.round_trips_s,
            instance=self._directory.namesake.instance,
            key_elsewhere=self._directory.namesake.found is not None,
            sequence=0,
            issued_at=0.0,
            expires_at=0.0,
        )


def _nobody_waits() -> None:
    """Stands for `started` after the first time."""
