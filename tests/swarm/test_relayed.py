"""Servers that nobody can dial: found, asked, and left for a better way, without losing a token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import trio
from torch import Tensor

from petals.models.source.loading import load_span
from petals.peer.base.config import NatConfig, RelayLimits
from petals.peer.client.model_client import ClientOptions
from petals.peer.net.wire.addresses import split_peer
from petals.peer.node import Peer
from tests.swarm.conftest import Swarm, Truth, all_leases_returned

LENGTHS = (5, *[1] * 15)


def inputs(truth: Truth) -> list[Tensor]:
    dice = torch.Generator().manual_seed(1)
    return [torch.randn(2, length, truth.checkpoint.hidden_size, generator=dice) for length in LENGTHS]


def expected(truth: Truth) -> list[Tensor]:
    span = load_span(truth.checkpoint, range(4))
    cache = span.new_cache(range(4), 2, sum(LENGTHS))
    return [span.step(hidden, cache) for hidden in inputs(truth)]


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - nobody tells when an address or a connection appears
            await trio.sleep(0.01)


def circuits(peer: Peer) -> int:
    assert peer.host.traversal.relay is not None
    return peer.host.traversal.relay.circuits


async def hidden_server(swarm: Swarm, relays: int) -> Peer:
    """A server that listens on nothing, once it has places at so many relays, which it found by itself."""
    server = await swarm.add(range(4), also={"listen": ()})
    await until(lambda: len([addr for addr in server.addrs if "p2p-circuit" in addr]) == relays)
    return server


@pytest.mark.parametrize("tiny_truth", ["llama"], indirect=True)
async def test_a_server_nobody_can_dial_serves_and_moves_to_a_direct_way_in_the_middle(
    make_swarm: Callable[..., Swarm], tiny_truth: Truth
) -> None:
    swarm = make_swarm(tiny_truth.directory)
    relay = await swarm.add(also={"nat": NatConfig(relay=RelayLimits())})
    server = await hidden_server(swarm, 1)
    client = await swarm.add()
    asked = await client.client()
    await asked.ready()
    session = await asked.open_session(asked.blocks, 2, sum(LENGTHS), ClientOptions())
    outputs = []
    for index, hidden in enumerate(inputs(tiny_truth)):
        if index == 8:  # the router opens: they can talk without the relay
            assert client.host.traversal.link(server.peer_id) == "relayed"
            assert session.hops[0].peer_id == server.peer_id
            way, name = split_peer(client.addrs[0])
            assert name is not None
            await server.host._network.race(name, [way])
            await until(lambda: client.host.traversal.link(server.peer_id) == "direct")
        outputs.append(await session.step(hidden))
        if index == 8:
            assert not client.host.has_better_way(session.hops[0].messages.stream)
            await until(lambda: circuits(relay) == 0)  # closed, since nobody needs it
    assert session.failures == 0
    await session.close()
    for got, wanted in zip(outputs, expected(tiny_truth), strict=True):
        assert torch.equal(got, wanted)
    await all_leases_returned(server)
    (record,) = await client.directory.lookup(asked.model)
    assert (record.using_relay, record.reachability) == (True, "relayed")


@pytest.mark.parametrize("tiny_truth", ["llama"], indirect=True)
async def test_a_relay_that_goes_in_the_middle_costs_no_token(
    make_swarm: Callable[..., Swarm], tiny_truth: Truth
) -> None:
    swarm = make_swarm(tiny_truth.directory)
    await swarm.add()
    relays = [await swarm.add(also={"nat": NatConfig(relay=RelayLimits())}) for _ in range(2)]
    server = await hidden_server(swarm, 2)
    asked = await (await swarm.add()).client()
    await asked.ready()
    session = await asked.open_session(asked.blocks, 2, sum(LENGTHS), ClientOptions())
    outputs = []
    for index, hidden in enumerate(inputs(tiny_truth)):
        if index == 8:
            (used,) = (relay for relay in relays if circuits(relay))
            await swarm.stop(used)
        outputs.append(await session.step(hidden))
    assert session.failures == 1
    await session.close()
    for got, wanted in zip(outputs, expected(tiny_truth), strict=True):
        assert torch.equal(got, wanted)
    await all_leases_returned(server)
