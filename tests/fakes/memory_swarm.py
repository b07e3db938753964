"""A swarm in memory: real sessions, real servers' protocol halves, real blocks; no network, a clock that jumps.

What is fake: streams (`loopback_pair`, which keeps the contract of the real ones), the lane (computes at once, in the
loop), the directory (knows who lives). Everything that decides - routing, bans, deadlines, replay, push - is the real
code, so a schedule of failures that is found here happens again from its seed.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import trio
import trio.testing
from trio._core import _run

from petals.dht.records import ServerRecord, ServerState
from petals.models.blocks.block import BlockSpan
from petals.peer.base.config import ServeConfig, Timeouts
from petals.peer.client.hops.hop import SessionSpec
from petals.peer.client.routing.routing import find_route
from petals.peer.client.routing.view import SwarmWatcher
from petals.peer.client.session.recovery import RecoveryOptions
from petals.peer.client.session.session import RemoteSession, SessionOptions
from petals.peer.engine.admission import Admission
from petals.peer.engine.cache_budget import CacheBudget
from petals.peer.engine.endpoint import Inbound
from petals.peer.engine.push_sender import Pusher
from petals.peer.engine.quotas import Rates
from petals.peer.engine.scheduler import Priority, Timed
from petals.peer.engine.throughput import Speedometer, Throughput
from petals.peer.net.wire.loopback import LoopbackStream, loopback_pair
from petals.protocols.errors import PeerUnreachable, SwarmError
from petals.protocols.inference import INFERENCE_V1
from petals.protocols.push import PUSH_V1
from petals.protocols.types import ModelId, PeerId

MODEL = ModelId("tiny", "ab" * 32)
CLIENT = PeerId("client")


class InlineLane:
    """Computes in the loop; a frozen server's lane never comes to it."""

    def __init__(self, dice: random.Random) -> None:
        self.frozen = False
        self._dice = dice

    def piece_rows(self, visitor: object, most: int) -> int:
        return most

    def slice_s(self) -> float:
        return 1.0

    async def submit(self, priority: Priority, work: Callable[[], Any], **_: Any) -> Timed[Any]:
        await trio.sleep(self._dice.uniform(0.0, 0.02))
        if self.frozen:
            await trio.sleep_forever()
        return Timed(work(), 0.0, 0.0)


class MemoryHost:
    """What sessions and servers need of a host."""

    def __init__(self, swarm: MemorySwarm, peer_id: PeerId) -> None:
        self._swarm = swarm
        self.peer_id = peer_id

    async def open_stream(self, peer_id: PeerId, protocol: str, *, addrs: Sequence[str] = ()) -> LoopbackStream:
        await trio.sleep(self._swarm.dice.uniform(0.0, 0.01))
        server = self._swarm.servers.get(peer_id)
        if server is None:
            raise PeerUnreachable("nobody there", peer_id)
        near, far = loopback_pair(self.peer_id, peer_id)
        self._swarm.nursery.start_soon(server.answer, protocol, far)
        return near

    def has_better_way(self, stream: object) -> bool:
        """Now and then the dice say that a session could leave its relay."""
        return self._swarm.dice.random() < self._swarm.better_ways

    def plausible(self, namer: PeerId, addrs: Sequence[str]) -> tuple[str, ...]:
        """Servers in memory have no addresses to doubt."""
        return tuple(addrs)

    def link(self, peer_id: PeerId) -> str:
        return "direct"

    async def ping(self, peer_id: PeerId) -> float:
        await trio.lowlevel.checkpoint()
        if peer_id not in self._swarm.servers:
            raise PeerUnreachable("nobody there", peer_id)
        return 0.01


@dataclass(eq=False)
class MemoryServer:
    """One server's protocol half."""

    peer_id: PeerId
    inbound: Inbound
    lane: InlineLane
    _scopes: dict[trio.CancelScope, None] = field(default_factory=dict)  # in order, for the sake of repetition

    async def answer(self, protocol: str, stream: LoopbackStream) -> None:
        """As `Host` runs a handler."""
        handler = {INFERENCE_V1: self.inbound.answer_inference, PUSH_V1: self.inbound.answer_push}[protocol]
        with trio.CancelScope() as scope:
            self._scopes[scope] = None
            try:
                await handler(stream)
                await stream.close()
            except SwarmError:
                await stream.reset()
        self._scopes.pop(scope, None)
        if scope.cancelled_caught:
            await stream.reset()

    def die(self) -> None:
        """All streams break at once."""
        for scope in list(self._scopes):
            scope.cancel()

    def record(self) -> ServerRecord:
        """What the directory knows."""
        return ServerRecord(
            model=MODEL, peer_id=self.peer_id, blocks=self.inbound.span.blocks, state=ServerState.ONLINE,
            inference_rps=100.0, forward_rps=100.0, cache_tokens_left=1 << 20, sequence=1, issued_at=0, expires_at=1e12,
        )  # fmt: skip


class MemorySwarm:
    """Servers that come and go as the dice say."""

    def __init__(self, nursery: trio.Nursery, seed: int) -> None:
        self.nursery = nursery
        self.dice = random.Random(seed)
        self.servers: dict[PeerId, MemoryServer] = {}
        self.host: Any = MemoryHost(self, CLIENT)
        self.watcher = SwarmWatcher(self.host, self, MODEL, update_s=5.0)  # type: ignore[arg-type]
        self.better_ways = 0.0
        """How often, of all steps at all hops, a better connection to a hop's server turns up."""
        self._names = iter(range(1_000_000))

    def add(self, span: BlockSpan, *, rates: Rates | None = None) -> MemoryServer:
        """A new server of these blocks."""
        peer_id = PeerId(f"server-{next(self._names)}")
        lane: Any = InlineLane(self.dice)
        speed = Speedometer(Throughput(100.0, 100.0), fixed=True)
        host: Any = MemoryHost(self, peer_id)
        admission = Admission(peer_id, MODEL.digest, verify=lambda *_: None, clock=trio.current_time)
        rates = rates or Rates(None, None, frozenset(), trio.current_time)
        inbound = Inbound(
            MODEL, span, lane, CacheBudget(64 << 20), ServeConfig(), admission, rates, speed=speed, pusher=Pusher(host)
        )
        self.servers[peer_id] = server = MemoryServer(peer_id, inbound, lane)
        return server

    def remove(self, server: MemoryServer) -> None:
        """A server dies."""
        del self.servers[server.peer_id]
        server.die()

    async def lookup(self, model: ModelId) -> tuple[ServerRecord, ...]:
        """Stands for the directory; a frozen server is still listed."""
        await trio.sleep(0.01)
        return tuple(server.record() for server in self.servers.values())

    def forget(self, model: ModelId, peer_id: PeerId) -> None:
        """The next lookup lists it again if it lives."""

    async def open_session(self, blocks: range, batch_size: int, max_length: int, **settings: Any) -> RemoteSession:
        """A real session over these servers."""
        hidden_size = next(iter(self.servers.values())).inbound.span.hidden_size
        spec = SessionSpec(model=MODEL, hidden_size=hidden_size, batch_size=batch_size, max_length=max_length)
        timeouts = Timeouts(open_s=2.0, step_s=6.0, min_step_s=1.0, route_s=60.0)

        def find(wanted: range, avoid: frozenset[PeerId]) -> Any:
            return find_route(self.watcher.view, wanted, pushed=True, blocked=avoid)

        how = {name: settings.pop(old) for old, name in (("exact_recovery", "exact"),) if old in settings}
        options = SessionOptions(recovery=RecoveryOptions(max_retries=50, **how), **settings)
        session = RemoteSession(self.host, self.watcher, blocks, spec, timeouts, find, options)
        await session.open()
        return session


def run_in_memory(seed: int, scenario: Callable[[MemorySwarm], Awaitable[None]]) -> None:
    """Run a scenario under a clock that jumps; whatever it started must have ended by itself."""

    async def main() -> None:
        torch.set_num_threads(1)
        async with trio.open_nursery() as watching:
            async with trio.open_nursery() as nursery:
                swarm = MemorySwarm(nursery, seed)
                await watching.start(swarm.watcher.run)
                await scenario(swarm)
            watching.cancel_scope.cancel()

    # trio shuffles tasks that are ready at the same time, with dice of its own; this is how its own tests hold them.
    _run._ALLOW_DETERMINISTIC_SCHEDULING = True
    _run._r.seed(seed)
    try:
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        _run._ALLOW_DETERMINISTIC_SCHEDULING = False


async def storm(
    swarm: MemorySwarm, spans: Sequence[BlockSpan], stop: trio.Event, mean_s: float, strikes: int = 40
) -> int:
    """Kill and freeze servers at random moments, never the last healthy one of its blocks; another one comes for each.
    A frozen one stays listed until it is struck again. Returns how many were struck."""
    dice, struck = swarm.dice, 0
    while struck < strikes:
        with trio.move_on_after(dice.expovariate(1 / mean_s)):
            await stop.wait()
            break
        server = dice.choice(list(swarm.servers.values()))
        blocks = server.inbound.span.blocks
        others = [other for other in swarm.servers.values() if other is not server]
        if not any(other.inbound.span.blocks == blocks and not other.lane.frozen for other in others):
            continue
        if server.lane.frozen or dice.random() < 0.8:
            swarm.remove(server)
            swarm.add(next(span for span in spans if span.blocks == blocks))
        else:
            server.lane.frozen = True
        struck += 1
    return struck
