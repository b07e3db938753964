"""Blocks that a client keeps at home: the same tokens, and no other server is ever asked for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petals import AutoDistributedModelForCausalLM
from petals.peer.client.model_client import ClientOptions, Prefix
from petals.peer.client.routing.local_blocks import name_of, split
from petals.peer.engine.stream_rules import Guard
from petals.protocols.errors import UserError
from petals.protocols.prefixes import prefix_names
from petals.protocols.types import PeerId
from tests.swarm.conftest import Swarm, Truth, all_leases_returned
from tests.tolerance import TINY, assert_rounded

MakeSwarm = Callable[..., Swarm]
ENDS = (range(1), range(3, 4))
IDS = torch.tensor([[5, 17, 99, 3], [8, 2, 45, 101]])


@given(
    wanted=st.tuples(st.integers(0, 12), st.integers(1, 12)),
    cuts=st.lists(st.integers(0, 12), min_size=4, max_size=4, unique=True).map(sorted),
)
def test_a_route_is_cut_where_home_begins_and_ends(wanted: tuple[int, int], cuts: list[int]) -> None:
    blocks, local = range(wanted[0], sum(wanted)), (range(cuts[2], cuts[3]), range(cuts[0], cuts[1]))
    runs = split(blocks, local)
    assert [block for run, _ in runs for block in run] == list(blocks)
    for run, kept in runs:
        assert all((block in kept) if kept is not None else all(block not in each for each in local) for block in run)


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """What servers of the swarm are asked to compute from now on. Those at home know nobody by a real name."""
    seen: list[range] = []
    check = Guard._check_servable

    def noted(guard: Guard, asked: Any) -> range:
        if guard.config.throughput is not None:  # every server of `Swarm` has one, none at home
            seen.append(range(asked.start_block, asked.end_block))
        return check(guard, asked)

    monkeypatch.setattr(Guard, "_check_servable", noted)
    return seen


async def test_tokens_are_those_of_the_unsplit_model_and_nobody_else_is_asked_for_the_ends(
    make_swarm: MakeSwarm, tiny_truth: Truth, asked_for: list[range]
) -> None:
    """Generation of the peer and of the model, beams, gradients, and two servers lost; servers hold the ends too."""
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    for blocks in (range(4), range(2), range(2, 4), range(4), range(4)):
        await swarm.add(blocks)
    model = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=bootstrap, local_blocks=[*ENDS], standby=True)
    settings = {"max_new_tokens": 8, "do_sample": False}
    for more in ({}, {"num_beams": 2}):
        expected = tiny_truth.model.generate(IDS, **settings, **more)
        assert torch.equal(await model.agenerate(IDS, **settings, **more), expected)

    def gradient(which: Any) -> torch.Tensor:
        embeddings = which.get_input_embeddings()(IDS).detach().requires_grad_()
        which(inputs_embeds=embeddings, labels=IDS).loss.backward()
        assert embeddings.grad is not None
        return embeddings.grad

    theirs = gradient(tiny_truth.model)
    assert_rounded(await model.run(gradient, model), theirs, terms=2 * TINY)
    async with model.ainference_session(max_length=12) as session:
        first = await model.agenerate(IDS, max_new_tokens=3)
        remote = session.cache.session.remote
        assert [hop.blocks for hop in remote.hops if hop.peer_id.endswith("@home")] == [*ENDS]
        lost = {hop.peer_id for hop in remote.hops}
        stopped = [peer for peer in swarm.peers if peer.peer_id in lost]
        for peer in stopped:
            await swarm.stop(peer)
        await remote.hops[0].messages.reset()  # a failure at home is survived as well
        rest = await model.agenerate(max_new_tokens=5)
        assert remote.failures >= 2
        assert [hop.blocks for hop in remote.hops if hop.peer_id.endswith("@home")] == [*ENDS]
    expected = tiny_truth.model.generate(IDS, **settings)
    assert torch.equal(torch.cat([first, rest], dim=1), expected)
    # Own work is nobody's: neither generation nor training books it, and it makes no peer of "0:1@home".
    assert 0 < len(bootstrap.ledger.accounts) <= 5
    assert set(bootstrap.ledger.accounts) <= {peer.peer_id for peer in (*swarm.peers, *stopped)}
    assert asked_for
    assert all(range(1, 3).start <= blocks.start and blocks.stop <= 3 for blocks in asked_for)
    for peer in swarm.peers[1:]:
        await all_leases_returned(peer)


@pytest.mark.parametrize("tiny_truth", ["llama"], indirect=True)
async def test_what_servers_keep_of_a_session_is_kept_at_home_too(
    make_swarm: MakeSwarm, tiny_truth: Truth, asked_for: list[range]
) -> None:
    swarm = make_swarm(tiny_truth.directory)
    server = await swarm.add(range(4))
    client = await (await swarm.add()).client()
    wanted = ClientOptions(local_blocks=ENDS)
    hidden = torch.randn(1, 40, client.checkpoint.hidden_size, generator=torch.Generator().manual_seed(1))
    names = tuple(prefix_names(list(range(32))))

    async def ask(prefix: Prefix | None) -> tuple[int, torch.Tensor]:
        session = await client.open_session(client.blocks, 1, 40, wanted, prefix=prefix)
        known = session.position
        output = await session.step(hidden[:, known:])
        await client.leave(session, names)
        return known, output[:, -1]

    await client.ready(wanted)
    nothing, whole = await ask(None)
    known, rest = await ask(Prefix(names, lambda: hidden))
    assert (nothing, known) == (0, 32)
    assert_rounded(rest, whole)
    assert {(blocks.start, blocks.stop) for blocks in asked_for} == {(1, 3)}
    await all_leases_returned(server)


async def test_a_client_can_do_without_anybody(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    peer = await make_swarm(tiny_truth.directory).add()
    model = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=peer, local_blocks=range(4))
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(await model.agenerate(IDS, **settings), tiny_truth.model.generate(IDS, **settings))


@pytest.mark.parametrize(
    ("local", "said"),
    [
        ((range(3, 5),), "the model has blocks 0:4"),
        ((range(2), range(1, 3)), "named twice"),
        (("0:2",), "a tuple of ranges"),
    ],
)
async def test_local_blocks_that_cannot_be(
    make_swarm: MakeSwarm, tiny_truth: Truth, local: tuple[Any, ...], said: str
) -> None:
    client = await (await make_swarm(tiny_truth.directory).add()).client()
    with pytest.raises(UserError, match=said):
        await client.ready(ClientOptions(local_blocks=local))


def test_the_name_of_home_can_be_no_peer_id() -> None:
    assert not set(":@") & set("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz")
    assert name_of(range(2)) == PeerId("0:2@home")
