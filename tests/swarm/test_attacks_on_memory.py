"""A live server under attack, once more: time and memory that one stranger can take."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from petals.peer.engine.scheduler import IDLE_SLICE_S, Lane, Priority
from tests.fakes.attackers import Attacker
from tests.swarm.test_attacks import Siege, done, siege  # noqa: F401

pytestmark = pytest.mark.parametrize("tiny_truth", ["llama"], indirect=True)
LONG = 8192
"""Tokens of one training request."""


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
async def test_a_long_training_request_lets_everybody_decode(
    siege: Siege,  # noqa: F811
    backward: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In pieces that take no longer than what the lane allows; whole sessions are served in between."""
    pieces: list[tuple[float, float]] = []
    served: list[int] = []
    submit = Lane.submit

    async def watched(lane: Lane, priority: Priority, work: Any, **more: Any) -> Any:
        result = await submit(lane, priority, work, **more)
        if priority in (Priority.FORWARD, Priority.BACKWARD):
            pieces.append((lane.slice_s(), result.compute_s))
        return result

    monkeypatch.setattr(Lane, "submit", watched)

    async def train(one: Attacker) -> None:
        await one.train(LONG, backward=backward, extras=True)
        await trio.sleep_forever()

    def enough() -> bool:  # asked after each session of the honest client
        served.append(len(pieces))
        return sum(bool(number) for number in served) > 4

    await siege.under(train, enough=enough)
    served = [number for number in served if number]
    assert served[0] < served[2], "it was computed in one go"
    decoding = sorted(took for allowed, took in pieces if allowed < IDLE_SLICE_S)
    assert decoding
    assert decoding[len(decoding) // 2] < 0.1, "a piece that holds everybody up"


async def test_half_sent_requests_and_pushes_are_held_up_to_a_share(siege: Siege) -> None:  # noqa: F811
    """One peer may hold half of the memory for requests, whatever it announces; all of it comes back."""
    assert siege.server.server is not None
    work = siege.server.server.inbound.work
    work.total_bytes, work._free_bytes, work._max_peer_bytes = 8 << 20, 8 << 20, 4 << 20
    least = [work.left_bytes]

    async def watch(_: Attacker) -> None:
        while True:
            least[0] = min(least[0], work.left_bytes)
            await trio.sleep(0.001)

    told: list[Attacker] = []

    async def half(one: Attacker) -> None:
        told.append(one)
        await one.half_sent(tokens=1000, count=40)

    async def pushes(one: Attacker) -> None:
        told.append(one)
        await one.fill_mailbox(tokens=16, count=8)

    await siege.under(half, watch, pushes, enough=lambda: done(told, "half-sent requests") >= 8)
    assert 4 << 20 <= least[0] + (64 << 10) < 8 << 20, "more than a share, or nothing at all, was held"
    assert work.left_bytes == work.total_bytes
