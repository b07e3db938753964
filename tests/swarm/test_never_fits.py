"""What is larger than a server ever gives is refused at once, in tokens, with the flag that changes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import trio

from petals.gateway.errors import as_api_error
from petals.models.client.distributed import load_model
from petals.peer.base.config import Timeouts
from petals.peer.client.model_client import ClientOptions
from petals.protocols.errors import NeverFits
from tests.swarm.conftest import Swarm, Truth, all_leases_returned

MakeSwarm = Callable[[str | None], Swarm]
PATIENT = {"timeouts": Timeouts(route_s=300.0)}
"""So that a retry would be seen."""


async def open_session(client_of: Swarm, tokens: int) -> None:
    client = await client_of.peers[-1].client()
    session = await client.open_session(client.blocks, 1, tokens)
    await session.close()


async def test_a_session_that_never_fits_is_refused_in_tokens(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(str(tiny_truth.directory))
    server = await swarm.add(range(4), cache_bytes=1 << 20)
    assert server.server is not None
    room = (1 << 20) // server.server.span.cache_bytes(range(4), 1, 1)
    await swarm.add(also=PATIENT)
    await open_session(swarm, room)
    with trio.fail_after(10), pytest.raises(NeverFits) as refused:
        await open_session(swarm, room + 1)
    said = str(refused.value)
    assert f"{room + 1:,} tokens over blocks 0:4 need" in said
    assert f"one peer may hold 1.0 MB here: {room:,} tokens" in said
    assert said.endswith("operator change --cache_mb")
    assert as_api_error(refused.value).status == 400
    await all_leases_returned(server)


async def test_a_share_of_the_cache_is_named_too(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(str(tiny_truth.directory))
    await swarm.add(range(4), cache_bytes=1 << 20, max_peer_share=0.25)
    await swarm.add(also=PATIENT)
    with trio.fail_after(10), pytest.raises(NeverFits, match="--cache_mb and --max_peer_share"):
        await open_session(swarm, 100_000)


async def test_a_larger_server_is_asked_before_giving_up(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(str(tiny_truth.directory))
    small = await swarm.add(range(4), cache_bytes=1 << 20, throughput=1e4)
    large = await swarm.add(range(4), cache_bytes=64 << 20, throughput=1.0)
    assert small.server is not None
    room = (1 << 20) // small.server.span.cache_bytes(range(4), 1, 1)
    await swarm.add(also=PATIENT)
    client = await swarm.peers[-1].client()
    with trio.fail_after(20):
        session = await client.open_session(client.blocks, 1, 2 * room)
    assert [hop.peer_id for hop in session.hops] == [large.peer_id]
    await session.close()


async def test_training_that_never_fits_is_not_asked_again(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(str(tiny_truth.directory))
    await swarm.add(range(4), max_batch_tokens=16)
    peer = await swarm.add(also=PATIENT)
    client = await peer.client()
    chain = client.chain(ClientOptions())

    def forward() -> None:
        model = load_model(client.checkpoint, chain)
        model(torch.full((2, 16), 5))

    with trio.fail_after(20), pytest.raises(NeverFits, match="32 tokens in one request, at most 16"):
        await trio.to_thread.run_sync(forward)
