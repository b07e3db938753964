"""A peer's life: what the swarm knows of it, and that the network lives while it computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import trio

from petals.peer.engine.scheduler import Priority
from tests.swarm.conftest import Swarm, Truth


async def test_a_peer_that_leaves_takes_its_record_back(make_swarm: Callable[..., Swarm], tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    server = await swarm.add(range(4))
    client = await bootstrap.client()
    await client.ready()
    assert [offer.record.peer_id for offer in client.watcher.view.offers] == [server.peer_id]
    await swarm.stop(server)
    with trio.fail_after(20):
        while client.watcher.view.offers:
            await client.watcher.changed(1.0)
    assert await bootstrap.directory.lookup(client.model) == ()


async def test_another_checkpoint_of_the_same_name_is_another_model(
    make_swarm: Callable[..., Swarm], tiny_truth: Truth, nursery: trio.Nursery
) -> None:
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    await swarm.add(range(4))
    client = await bootstrap.client()
    other = client.model._replace(digest="00" * 32)
    assert len(await bootstrap.directory.lookup(client.model)) == 1
    assert await bootstrap.directory.lookup(other) == ()


async def test_pings_are_answered_while_a_block_computes(make_swarm: Callable[..., Swarm], tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    server = await swarm.add(range(4))
    client = await swarm.add()
    assert server.server is not None
    stop = [False]

    def compute() -> None:
        weights = torch.randn(256, 256)
        while not stop[0]:
            weights = torch.tanh(weights @ weights)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.server.lane.submit, Priority.DECODE, compute)
        with trio.fail_after(20):
            for _ in range(5):
                assert await client.host.ping(server.peer_id) > 0
        stop[0] = True
