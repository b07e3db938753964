"""A server that says it is the fastest and answers each step late, without ever failing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import trio

from petals.peer.client.session.moving import SLOW_S, SLOW_STEPS
from petals.peer.node import Peer
from tests.swarm.conftest import Swarm, Truth, all_leases_returned

pytestmark = pytest.mark.parametrize("tiny_truth", ["llama"], indirect=True)
LATE_S = 3 * SLOW_S


def tarpit(peer: Peer) -> list[int]:
    """Let it answer late; how many steps it was asked."""
    assert peer.server is not None
    inbound: Any = peer.server.inbound
    compute, asked = inbound._compute, [0]

    async def late(*args: Any) -> Any:
        asked[0] += 1
        await trio.sleep(LATE_S)
        return await compute(*args)

    inbound._compute = late
    return asked


@pytest.mark.parametrize("claims", [1e8, 1e4], ids=["an absurd speed", "a credible speed"])
async def test_a_session_moves_and_the_next_one_knows(
    make_swarm: Callable[..., Swarm], tiny_truth: Truth, claims: float
) -> None:
    swarm = make_swarm(tiny_truth.directory)
    slow = await swarm.add(range(4), throughput=claims)
    honest = await swarm.add(range(4), throughput=500.0)
    asked = tarpit(slow)
    client = await (await swarm.add()).client()
    steps = torch.randn(12, 1, 1, client.checkpoint.hidden_size, generator=torch.Generator().manual_seed(0))

    async def session() -> list[torch.Tensor]:
        opened = await client.open_session(client.blocks, 1, 16)
        outputs = [await opened.step(step) for step in steps]
        await opened.close()
        assert not opened.failures
        return outputs

    with trio.fail_after(60):
        first = await session()
        assert 0 < asked[0] <= SLOW_STEPS + 1
        second = await session()
    assert asked[0] <= SLOW_STEPS + 1, "what was measured was forgotten with the session"
    for mine, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(mine, theirs)
    await all_leases_returned(honest)
    await all_leases_returned(slow)


async def test_nobody_moves_where_nobody_else_is(make_swarm: Callable[..., Swarm], tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    slow = await swarm.add(range(4))
    asked = tarpit(slow)
    client = await (await swarm.add()).client()
    session = await client.open_session(client.blocks, 1, 8)
    with trio.fail_after(60):
        for _ in range(SLOW_STEPS + 2):
            await session.step(torch.zeros(1, 1, client.checkpoint.hidden_size))
    assert asked[0] == SLOW_STEPS + 2
    assert not session.failures
    await session.close()
