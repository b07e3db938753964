"""What a server says of itself is measured: speeds by its own work, the queue by those who waited."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from petals.dht.records import ServerRecord, ServerState
from petals.peer.engine.scheduler import QUEUE_MEMORY_S, Lane, Priority
from petals.peer.engine.throughput import Speedometer, Throughput
from petals.peer.net.round_trips import FRESH_S, RoundTrips
from petals.peer.server.next_hops import MAX_NEIGHBOURS, likely_neighbours
from petals.peer.server.placement import blocks_that_fit
from petals.protocols.errors import PeerUnreachable
from petals.protocols.types import ModelId, PeerId

A, B = PeerId("a"), PeerId("b")


class FakeHost:
    peer_id = PeerId("me")

    def __init__(self) -> None:
        self.seconds = {A: 0.1, B: 0.2}
        self.pings = 0

    async def ping(self, peer_id: PeerId) -> float:
        self.pings += 1
        await trio.sleep(self.seconds[peer_id])
        if self.seconds[peer_id] > 1:
            raise PeerUnreachable("gone", peer_id)
        return self.seconds[peer_id]


async def test_round_trips_are_renewed_when_due_and_forgotten_with_their_peer(autojump_clock: MockClock) -> None:
    host = FakeHost()
    trips = RoundTrips(host)  # type: ignore[arg-type]
    await trips.refresh([A, B, host.peer_id])
    await trips.refresh([A, B])
    assert (dict(trips.seconds), host.pings) == ({A: 0.1, B: 0.2}, 2)
    await trio.sleep(FRESH_S)
    host.seconds = {A: 0.3, B: 1.5}
    await trips.refresh([A, B])
    assert dict(trips.seconds) == {A: pytest.approx(0.2)}
    host.seconds[B] = 0.4
    await trips.refresh([B])
    assert (dict(trips.seconds), host.pings) == ({B: 0.4}, 5)


def test_speeds_follow_the_work() -> None:
    speed = Speedometer(Throughput(100.0, 1000.0))
    for _ in range(200):
        speed.note(blocks=10, rows=1, tokens=1, compute_s=0.2)
        speed.note(blocks=10, rows=2, tokens=64, compute_s=0.5)
        speed.note(blocks=10, rows=4, tokens=1, compute_s=0.001)  # neither of the two cases: says nothing
    assert speed.throughput.inference_rps == pytest.approx(50.0, rel=0.01)
    assert speed.throughput.forward_rps == pytest.approx(2560.0, rel=0.01)
    fixed = Speedometer(Throughput(7.0, 7.0), fixed=True)
    fixed.note(10, 1, 1, 0.2)
    assert fixed.throughput == Throughput(7.0, 7.0)


async def test_the_queue_is_remembered_and_forgotten(autojump_clock: MockClock) -> None:
    lane = Lane()
    assert lane.queue_s() == 0
    lane._note_delay(0.5)
    assert lane.queue_s() == pytest.approx(0.5)  # nothing was known before
    await trio.sleep(QUEUE_MEMORY_S)
    assert lane.queue_s() == pytest.approx(0.5 / 2.718, rel=0.01)
    for _ in range(100):
        lane._note_delay(0.0)
    assert lane.queue_s() < 0.001


async def test_a_job_that_waited_is_heard_of(nursery: trio.Nursery) -> None:
    lane = Lane()
    nursery.start_soon(lane.run)
    await lane.submit(Priority.DECODE, lambda: None)
    assert 0 <= lane.queue_s() < 1


def test_neighbours_are_those_that_can_come_next() -> None:
    def record(name: str, blocks: range, rps: float = 1.0, state: ServerState = ServerState.ONLINE) -> ServerRecord:
        return ServerRecord(
            model=ModelId("m", "ab" * 32), peer_id=PeerId(name), blocks=blocks, state=state,
            inference_rps=rps, sequence=1, issued_at=0, expires_at=1,
        )  # fmt: skip

    swarm = [
        record("me", range(4)),
        record("same", range(4)),
        record("next", range(4, 8)),
        record("faster", range(2, 8), rps=9.0),
        record("gap", range(5, 8)),
        record("leaving", range(4, 8), state=ServerState.DRAINING),
    ]
    assert likely_neighbours(swarm, PeerId("me"), range(4)) == ["faster", "next"]
    crowd = [record(f"p{index:03}", range(4, 8)) for index in range(50)]
    assert len(likely_neighbours(crowd, PeerId("me"), range(4))) == MAX_NEIGHBOURS


def test_blocks_that_fit() -> None:
    assert blocks_that_fit(10_000, 1_000, 2_000, 500) == 6
    assert blocks_that_fit(2_000, 1_000, 2_000, 500) < 1
