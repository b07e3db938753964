"""Bans by the type of the error, and a view that waits for what is missing."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from petals.dht.records import ServerRecord, ServerState
from petals.dht.troubles import Refusals
from petals.peer.client.routing.view import FORGIVE_S, MAX_BAN_S, NONSENSE_BAN_S, SILENCE_BAN_S, Bans, SwarmWatcher
from petals.protocols.errors import (
    MissingBlocks,
    PeerBusy,
    PeerUnreachable,
    RemoteError,
    RemoteProtocolError,
    RequestRefused,
)
from petals.protocols.types import ModelId, PeerId

MODEL = ModelId("tiny", "ab" * 32)
A = PeerId("a")


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (PeerBusy("full", A), 0.0),
        (RequestRefused("other blocks", A), 0.0),
        (PeerUnreachable("silence", A), SILENCE_BAN_S),
        (RemoteProtocolError("nonsense", A), NONSENSE_BAN_S),
    ],
)
def test_the_type_of_an_error_decides(error: RemoteError, seconds: float) -> None:
    bans = Bans(lambda: 100.0)
    bans.report(A, error)
    assert bans.left_s(A) == seconds
    assert bans.left_s(PeerId("b")) == 0.0


def test_bans_grow_and_are_forgiven() -> None:
    now = [0.0]
    bans = Bans(lambda: now[0])
    for offence in range(20):
        bans.report(A, PeerUnreachable("silence", A))
        assert bans.left_s(A) == min(MAX_BAN_S, SILENCE_BAN_S * 2**offence)
    now[0] += MAX_BAN_S
    assert bans.left_s(A) == 0.0
    now[0] += FORGIVE_S + 1
    bans.report(A, PeerUnreachable("silence", A))
    assert bans.left_s(A) == SILENCE_BAN_S


class FakeSwarm:
    """A directory and a host in one."""

    peer_id = PeerId("me")

    def __init__(self) -> None:
        self.records: dict[PeerId, ServerRecord] = {}
        self.round_trip_s = 0.02
        self.refusals = Refusals(trio.current_time)

    def serve(self, name: str, blocks: range, state: ServerState = ServerState.ONLINE) -> None:
        self.records[PeerId(name)] = ServerRecord(
            model=MODEL, peer_id=PeerId(name), blocks=blocks, state=state, sequence=1, issued_at=0, expires_at=1
        )

    async def lookup(self, model: ModelId) -> tuple[ServerRecord, ...]:
        await trio.sleep(0.1)
        return tuple(self.records.values())

    def forget(self, model: ModelId, peer_id: PeerId) -> None:
        self.records.pop(peer_id, None)

    async def look_for_namesake(self, model: ModelId) -> list[str]:
        await trio.lowlevel.checkpoint()
        return []

    async def ping(self, peer_id: PeerId) -> float:
        await trio.sleep(self.round_trip_s)
        return self.round_trip_s


async def test_the_view_follows_the_swarm(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    swarm = FakeSwarm()
    swarm.serve("a", range(4))
    swarm.serve("loading", range(4, 8), ServerState.JOINING)
    watcher = SwarmWatcher(swarm, swarm, MODEL, update_s=10)  # type: ignore[arg-type]
    await nursery.start(watcher.run)
    (offer,) = watcher.view.offers
    assert (offer.record.peer_id, offer.round_trip_s, offer.ban_left_s) == ("a", 0.02, 0.0)
    assert watcher.view.missing(range(8)) == [4, 5, 6, 7]

    with pytest.raises(MissingBlocks, match=r"4:8.*waited 7 s") as missing:
        await watcher.wait_for(range(8), trio.current_time() + 7)
    assert missing.value.blocks == (4, 5, 6, 7)

    async def come_up() -> None:
        await trio.sleep(3)
        swarm.serve("loading", range(4, 8))

    nursery.start_soon(come_up)
    started = trio.current_time()
    await watcher.wait_for(range(8), started + 60)
    assert trio.current_time() - started < 10

    watcher.report(A, PeerUnreachable("silence", A))
    assert watcher.view.missing(range(8)) == [0, 1, 2, 3]
    swarm.serve("a", range(4))  # it was only away
    await watcher.wait_for(range(8), trio.current_time() + 60)
    assert {each.record.peer_id: each.ban_left_s > 0 for each in watcher.view.offers} == {"a": True, "loading": False}
