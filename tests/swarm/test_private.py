"""A swarm that is not for everybody: its key, whom servers take, invitations, and what one peer may have."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import trio

from petals.models.client.causal_lm import load_causal_lm
from petals.peer.base.config import PeerConfig, Timeouts
from petals.peer.base.identity import create_identity
from petals.peer.client.model_client import ClientOptions
from petals.peer.membership.invitation import issue
from petals.peer.net.swarm_key import create_swarm_key, load_swarm_key
from petals.peer.node import Peer, open_peer
from petals.protocols.errors import Forbidden, PeerUnreachable, UserError
from petals.protocols.types import PeerId
from tests.swarm.conftest import Swarm, Truth, all_leases_returned

pytestmark = pytest.mark.parametrize("tiny_truth", ["llama"], indirect=True)
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


# -- whom servers take -----------------------------------------------------------------------------------------------


def name_of(path: Path) -> PeerId:
    return create_identity(path).peer_id


async def test_blocks_are_for_the_listed_and_the_directory_for_all(
    make_swarm: MakeSwarm, tiny_truth: Truth, tmp_path: Path
) -> None:
    friend_key = tmp_path / "friend.key"
    swarm = make_swarm(tiny_truth.directory)
    server = await swarm.add(range(4), allowed=frozenset({name_of(friend_key)}))
    stranger = await swarm.add(also={"timeouts": Timeouts(route_s=120.0)})
    friend = await swarm.add(identity=friend_key)
    assert torch.equal(await generated(friend, tiny_truth), expected(tiny_truth))
    assert torch.equal(await generated(server, tiny_truth), expected(tiny_truth)), "a server may ask itself"
    client = await stranger.client()
    assert len(await stranger.directory.lookup(client.model)) == 1
    assert await stranger.host.ping(server.peer_id) > 0
    hidden = torch.zeros(1, 2, client.checkpoint.hidden_size)
    with trio.fail_after(60), pytest.raises(Forbidden, match=f"not for {stranger.peer_id}"):
        await client.open_session(client.blocks, 1, 8)
    chain = client.chain(ClientOptions(max_retries=0))
    for needs_grad in (False, True):
        with pytest.raises(Forbidden):
            await stranger.portal.run_sync(partial(chain.forward, hidden.clone().requires_grad_(needs_grad)))
    await all_leases_returned(server)


async def test_who_is_refused_by_one_goes_to_another(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    closed = await swarm.add(range(4), allowed=frozenset(), throughput=1e6)
    other = await swarm.add(range(4))
    peer = await swarm.add()
    client = await peer.client()
    with trio.fail_after(20):
        while len(client.watcher.view.offers) < 2:
            await client.watcher.changed(1.0)
    session = await client.open_session(client.blocks, 1, 8)
    assert [hop.peer_id for hop in session.hops] == [other.peer_id]
    bans = {offer.record.peer_id: offer.ban_left_s for offer in client.watcher.view.offers}
    assert bans[closed.peer_id] > 100, "asked once, and not again soon"
    await session.close()


async def test_the_connections_of_blocked_peers_are_closed(
    make_swarm: MakeSwarm, tiny_truth: Truth, tmp_path: Path
) -> None:
    key = tmp_path / "nuisance.key"
    nuisance_id = name_of(key)
    swarm = make_swarm(tiny_truth.directory)
    server = await swarm.add(range(4), also={"blocked": frozenset({nuisance_id})})
    bystander = await swarm.add()
    nuisance = await swarm.add(identity=key, also={"initial_peers": bystander.addrs})
    with trio.fail_after(20):
        with pytest.raises(PeerUnreachable):
            await ask_for_a_ping(nuisance, server)
        with pytest.raises(PeerUnreachable, match="it is blocked here"):
            await server.host.connect(nuisance.addrs[0])
    assert not server.host.is_connected(nuisance_id)
    assert await server.host.ping(bystander.peer_id) > 0


async def ask_for_a_ping(asker: Peer, asked: Peer) -> None:
    """Connect; who dials may be through with that before the other end has hung up."""
    await asker.host.connect(asked.addrs[0])
    await asker.host.ping(asked.peer_id)


# -- invitations -----------------------------------------------------------------------------------------------------


async def test_a_token_alone_lets_its_bearer_in(make_swarm: MakeSwarm, tiny_truth: Truth, tmp_path: Path) -> None:
    """Address, swarm key and admission in one line; the second server trusts the issuer, who is the first."""
    swarm_key, issuer_key, key = tmp_path / "swarm.key", tmp_path / "issuer.key", tmp_path / "bearer.key"
    create_swarm_key(swarm_key)
    issuer = create_identity(issuer_key)
    swarm = make_swarm(tiny_truth.directory)
    swarm.common["swarm_key"] = swarm_key
    first = await swarm.add(range(3), identity=issuer_key, invited_by=frozenset())
    second = await swarm.add(range(3, 4), invited_by=frozenset({issuer.peer_id}))
    week = time.time() + 7 * 86400
    text = issue(issuer, expires_at=week, addrs=first.addrs, swarm_key=load_swarm_key(swarm_key))
    by_token = {"initial_peers": (), "swarm_key": None, "invitation": text}
    bearer = await swarm.add(identity=key, also=by_token)
    for server in (first, second):  # servers ask each other only if they are invited, too
        with pytest.raises(Forbidden, match="its operator knows"):
            await opened(server)
    assert torch.equal(await generated(bearer, tiny_truth), expected(tiny_truth))
    await bearer.host.disconnect(first.peer_id)
    assert torch.equal(await generated(bearer, tiny_truth), expected(tiny_truth)), "shown again where it must be"
    another = await swarm.add(also=by_token)
    with trio.fail_after(20), pytest.raises(Forbidden, match="used up"):
        await opened(another)
    for server in (first, second):
        await all_leases_returned(server)


async def test_an_open_server_is_not_shown_an_invitation(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    await swarm.add(range(4))
    text = issue(create_identity(), expires_at=time.time() + 60)
    bearer = await swarm.add(also={"invitation": text})
    assert torch.equal(await generated(bearer, tiny_truth), expected(tiny_truth))


async def opened(peer: Peer) -> None:
    client = await peer.client()
    await client.ready()
    await (await client.open_session(client.blocks, 1, 8)).close()
