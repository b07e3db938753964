"""When a server speaks: at every change, soon again at first, never beyond its record's life."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from petals.dht.records import ServerRecord, ServerState
from petals.peer.server.announcer import SOON_S, Announcer
from tests.peer.test_placement import record

EVERY_S = 30.0


class FakeDirectory:
    def __init__(self) -> None:
        self.heard: list[tuple[float, ServerRecord]] = []

    async def announce(self, said: ServerRecord) -> None:
        self.heard.append((trio.current_time(), said))

    withdraw = announce


@pytest.mark.parametrize("dice", [0.0, 0.5, 1.0])
async def test_a_newcomer_repeats_itself_and_is_never_forgotten(
    autojump_clock: MockClock, nursery: trio.Nursery, dice: float
) -> None:
    directory: Any = FakeDirectory()
    announcer = Announcer(
        directory, lambda: record("me", range(4)), EVERY_S, clock=trio.current_time, dice=lambda: dice
    )
    await announcer.enter(ServerState.JOINING)
    await announcer.enter(ServerState.ONLINE)
    began = trio.current_time()
    nursery.start_soon(announcer.run)
    await trio.sleep(10 * EVERY_S)
    await announcer.leave(1.0)
    heard = directory.heard
    assert [said.state for _, said in heard[:3]] == [ServerState.JOINING, ServerState.ONLINE, ServerState.ONLINE]
    assert heard[2][0] - began == pytest.approx(SOON_S * (0.5 + dice))
    assert heard[-1][1].state is ServerState.OFFLINE
    for (_, before), (at, after) in itertools.pairwise(heard):
        assert at < before.expires_at == before.issued_at + 3 * EVERY_S
        assert after.sequence > before.sequence
    nursery.cancel_scope.cancel()
