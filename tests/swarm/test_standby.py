"""Second servers stand by: a failure costs no replay, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import trio

from petals.peer.client.hops.hop import Hop, StepInput
from petals.peer.client.model_client import ClientOptions
from petals.peer.client.session.session import RemoteSession
from tests.swarm.conftest import Swarm, Truth, all_leases_returned


async def until_ready(session: RemoteSession) -> None:
    """Wait until every hop's shadow lacks nothing; the deadline is the test's own."""
    assert session.standbys is not None
    with trio.fail_after(20):
        while not session.standbys.ready:  # noqa: ASYNC110
            await trio.sleep(0.001)  # a poll of the state waited for


async def test_a_standby_takes_over_without_a_replay(
    make_swarm: Callable[..., Swarm], tiny_truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    for blocks in (range(2), range(2, 4)) * 2:
        await swarm.add(blocks)
    client = await bootstrap.client()
    await client.ready()
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(2, n, client.checkpoint.hidden_size, generator=generator) for n in (5, 1, 1, 1, 1, 1, 1)]
    replayed: list[int] = []
    replay = Hop.replay

    async def counted(hop: Hop, history: Sequence[StepInput], **settings: Any) -> list[torch.Tensor]:
        replayed.append(len(history))
        return await replay(hop, history, **settings)

    monkeypatch.setattr(Hop, "replay", counted)

    async def run(options: ClientOptions, lose: bool) -> list[torch.Tensor]:
        session = await client.open_session(client.blocks, 2, 12, options)
        outputs = []
        for index, hidden in enumerate(steps):
            if index == 3:
                session.rollback(6)
            if index == 5 and lose:
                await until_ready(session)
                replayed.clear()
                for hop in list(session.hops):
                    await swarm.stop(next(peer for peer in swarm.peers if peer.peer_id == hop.peer_id))
            order = torch.tensor([1, 0]) if index == 4 else None
            outputs.append(await session.step(hidden, hypo_ids=order))
        assert session.failures == (2 if lose else 0)
        await session.close()
        return outputs

    expected = await run(ClientOptions(), lose=False)
    for got, wanted in zip(await run(ClientOptions(standby=True), lose=True), expected, strict=True):
        assert torch.equal(got, wanted)
    assert sum(replayed) <= 2  # at most what the shadows were told since, never the history
    for peer in swarm.peers:
        if peer.server is not None:
            await all_leases_returned(peer)


async def test_without_a_second_server_there_is_no_standby(make_swarm: Callable[..., Swarm], tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    await swarm.add(range(4))
    client = await (await swarm.add()).client()
    await client.ready()
    session = await client.open_session(client.blocks, 1, 4, ClientOptions(standby=True))
    await session.step(torch.zeros(1, 2, client.checkpoint.hidden_size))
    assert session.standbys is not None
    assert not session.standbys.ready
    await session.close()
    server = swarm.peers[0]
    await all_leases_returned(server)
