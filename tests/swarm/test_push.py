"""Servers push to each other: the same numbers, believed only from whom the client announced, and never needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import trio

from petals.peer.client.model_client import ClientOptions, ModelClient
from petals.peer.client.session.session import RemoteSession
from petals.peer.engine.cache_budget import CacheBudget
from petals.peer.engine.push_inbox import MAX_EARLY, Mailbox, Pushed
from petals.peer.engine.push_sender import Pusher
from petals.peer.node import Peer
from petals.protocols import messages_pb2 as pb
from petals.protocols.push import PUSH_V1
from petals.protocols.tensors import encode_tensor
from petals.protocols.types import PeerId
from tests.swarm.conftest import Swarm, Truth, all_leases_returned

MakeSwarm = Callable[..., Swarm]
PUSHED, RELAYED = ClientOptions(use_server_to_server=True), ClientOptions(use_server_to_server=False)


async def three_hops(make_swarm: MakeSwarm, truth: Truth) -> tuple[Swarm, ModelClient, list[Peer]]:
    swarm = make_swarm(truth.directory)
    bootstrap = await swarm.add()
    servers = [await swarm.add(blocks) for blocks in (range(1), range(1, 3), range(3, 4))]
    client = await bootstrap.client()
    await client.ready()
    return swarm, client, servers


def some_steps(size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, n, size, generator=generator) for n in (5, 1, 3, 1, 1, 1, 1, 1)]


async def run(client: ModelClient, options: ClientOptions = PUSHED, **hooks: Any) -> list[torch.Tensor]:
    """Steps with a reordering and a roll-back; hooks[stepN] is awaited before step N."""
    session = await client.open_session(client.blocks, 2, 20, options)
    outputs = []
    for index, hidden in enumerate(some_steps(client.checkpoint.hidden_size)):
        if f"step{index}" in hooks:
            await hooks[f"step{index}"](session)
        if index == 4:
            session.rollback(7)
        outputs.append(await session.step(hidden, hypo_ids=torch.tensor([1, 0]) if index == 2 else None))
    await session.close()
    return outputs


def count_pushes(servers: list[Peer], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who gets pushes, in order."""
    received: list[str] = []
    put = Mailbox.put

    def counted(mailbox: Mailbox, pushed: Pushed) -> None:
        received.append(pushed.sender)
        put(mailbox, pushed)

    monkeypatch.setattr(Mailbox, "put", counted)
    return received


async def test_pushed_steps_give_the_same_bits(
    make_swarm: MakeSwarm, tiny_truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client, servers = await three_hops(make_swarm, tiny_truth)
    received = count_pushes(servers, monkeypatch)
    expected = await run(client, RELAYED)
    assert received == []
    for got, wanted in zip(await run(client), expected, strict=True):
        assert torch.equal(got, wanted)
    assert received == [servers[0].peer_id, servers[1].peer_id] * 8
    for server in servers:
        await all_leases_returned(server)
        assert server.server is not None
        assert not server.server.inbound._mailboxes


async def test_a_push_that_does_not_come_is_supplied_and_not_asked_for_again(
    make_swarm: MakeSwarm, tiny_truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client, servers = await three_hops(make_swarm, tiny_truth)
    received = count_pushes(servers, monkeypatch)
    expected = await run(client, RELAYED)
    unpushable = []

    async def deaf(session: RemoteSession) -> None:
        servers[1].host.remove_handler(PUSH_V1)  # as if its router let nobody in

    async def note(session: RemoteSession) -> None:
        unpushable.append(set(session.unpushable))
        assert session.failures == 0

    for got, wanted in zip(await run(client, step1=deaf, step3=note), expected, strict=True):
        assert torch.equal(got, wanted)
    assert unpushable == [{(servers[0].peer_id, servers[1].peer_id)}]
    assert received == [servers[0].peer_id, *[servers[1].peer_id] * 8]


@pytest.mark.parametrize("moment", [0, 1, 5])
@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (0, 1), (1, 2)])
async def test_whoever_is_lost_not_a_bit_is(
    make_swarm: MakeSwarm, tiny_truth: Truth, lost: tuple[int, ...], moment: int
) -> None:
    swarm, client, _ = await three_hops(make_swarm, tiny_truth)
    expected = await run(client, RELAYED)
    for blocks in (range(1), range(1, 2), range(2, 3), range(3, 4)):
        await swarm.add(blocks)

    async def lose(session: RemoteSession) -> None:
        for index in lost:
            peer_id = session.hops[index].peer_id
            await swarm.stop(next(peer for peer in swarm.peers if peer.peer_id == peer_id))

    got = await run(client, **{f"step{moment}": lose})
    for each, wanted in zip(got, expected, strict=True):
        assert torch.equal(each, wanted)
    for peer in swarm.peers:
        if peer.server is not None:
            await all_leases_returned(peer)


async def test_strangers_push_nothing(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    """A peer that knows session and step, but is not the announced sender, changes no number."""
    swarm, client, _ = await three_hops(make_swarm, tiny_truth)
    stranger = await swarm.add()
    expected = await run(client, RELAYED)

    async def interfere(session: RemoteSession) -> None:
        target = session.hops[1].push_target()
        for shape in ((2, 1, client.checkpoint.hidden_size), (2, 3, client.checkpoint.hidden_size), (1, 1, 7)):
            header, payload = encode_tensor(torch.full(shape, 9.0))
            await Pusher(stranger.host).push(target, header, payload)

    got = await run(client, step1=interfere, step2=interfere, step5=interfere)
    for each, wanted in zip(got, expected, strict=True):
        assert torch.equal(each, wanted)


async def test_a_mailbox_takes_what_was_announced() -> None:
    """And gives back the bytes of what it drops."""
    budget = CacheBudget(1 << 20)
    leases = iter([await budget.acquire(PeerId("a"), 100, 0.0) for _ in range(20)])

    def push(sender: str, step_id: int, tokens: int = 1) -> Pushed:
        header = pb.Tensor(dtype=pb.FLOAT32, shape=[1, tokens, 4])
        return Pushed(PeerId(sender), pb.Push(step_id=step_id, hidden=header), bytearray(16 * tokens), next(leases))

    step = pb.Step(step_id=3, pushed_by="a", hidden=pb.Tensor(dtype=pb.FLOAT32, shape=[1, 1, 4]))
    mailbox = Mailbox(pb.Open())
    for wrong in (push("b", 3), push("a", 2)):
        mailbox.put(wrong)
    with trio.move_on_after(0.01) as scope:
        await mailbox.take(step)
    assert scope.cancelled_caught
    assert mailbox.dropped == 2
    right = push("a", 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.lowlevel.checkpoint)
        mailbox.put(push("a", 3, tokens=2))
        mailbox.put(right)
        assert await mailbox.take(step) is right
    for index in range(MAX_EARLY + 3):
        mailbox.put(push("a", 10 + index))
    assert mailbox.dropped == 2 + 1 + 3
    right.lease.release()  # as its taker does
    mailbox.clear()
    for unused in leases:
        unused.release()
    assert budget.left_bytes == budget.total_bytes
