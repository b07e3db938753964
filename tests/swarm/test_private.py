"""A swarm that is not for everybody: its key, whom servers take, invitations, and what one peer may have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import trio

from petals.models.causal_lm import load_causal_lm
from petals.peer.config import PeerConfig
from petals.peer.node import Peer, open_peer
from petals.peer.swarm_key import create_swarm_key
from petals.protocols.errors import UserError
from tests.swarm.conftest import Swarm, Truth, all_leases_returned

MakeSwarm = Callable[..., Swarm]
IDS = torch.tensor([[5, 17, 99, 3]])


async def generated(peer: Peer, truth: Truth, tokens: int = 8) -> torch.Tensor:
    """What the swarm says, by way of `peer`."""
    client = await peer.client()
    await client.ready()
    model = load_causal_lm(truth.checkpoint, client.chain())
    return await peer.portal.run_sync(partial(model.generate, IDS, max_new_tokens=tokens, do_sample=False))


def expected(truth: Truth, tokens: int = 8) -> torch.Tensor:
    return truth.model.generate(IDS, max_new_tokens=tokens, do_sample=False)


async def test_a_swarm_with_a_key_generates_and_lets_nobody_else_in(
    make_swarm: MakeSwarm, tiny_truth: Truth, tmp_path: Path
) -> None:
    key, other = tmp_path / "swarm.key", tmp_path / "other.key"
    create_swarm_key(key)
    create_swarm_key(other)
    swarm = make_swarm(tiny_truth.directory)
    swarm.common["swarm_key"] = key
    first = await swarm.add(range(3))
    await swarm.add(range(3, 4))
    client = await swarm.add()
    assert torch.equal(await generated(client, tiny_truth), expected(tiny_truth))
    for stranger in (None, other):
        config = PeerConfig(model=swarm.model, initial_peers=first.addrs, swarm_key=stranger)
        with trio.fail_after(20), pytest.raises(UserError, match=r"no initial peer answers: .*swarm key"):
            async with open_peer(config):
                pass
    for server in swarm.peers[:2]:
        await all_leases_returned(server)
