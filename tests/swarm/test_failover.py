"""A server that leaves in the middle costs time, never a token."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import trio.testing

from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.local import LocalChain
from petals.models.source.loading import load_span
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.client.model_client import ClientOptions
from petals.peer.client.session.session import RemoteSession
from petals.protocols.errors import MissingBlocks, PeerUnreachable
from petals.protocols.framing import encode_frame
from petals.protocols.inference import INFERENCE_V1
from petals.protocols.stream import MessageStream
from tests.swarm.conftest import Swarm, Truth, all_leases_returned
from tests.tolerance import TINY, assert_rounded

MakeSwarm = Callable[..., Swarm]


async def drop(swarm: Swarm, session: RemoteSession, index: int) -> None:
    """End the server that holds the session's hop `index`, connections and all."""
    peer_id = session.hops[index].peer_id
    await swarm.stop(next(peer for peer in swarm.peers if peer.peer_id == peer_id))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("moment", [0, 1, 5])
async def test_logits_are_equal_after_a_server_was_lost(
    make_swarm: MakeSwarm, tiny_truth: Truth, moment: int, exact: bool
) -> None:
    """To the last bit if that is wanted, else up to rounding."""
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    for blocks in (range(2), range(2), range(2, 4), range(2, 3), range(3, 4)):
        await swarm.add(blocks)
    client = await bootstrap.client()
    await client.ready()
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(2, n, client.checkpoint.hidden_size, generator=generator) for n in (5, 1, 3, 1, 1, 1, 1)]

    async def run(lose_at: int | None) -> list[torch.Tensor]:
        session = await client.open_session(client.blocks, 2, 16, ClientOptions(exact_recovery=exact))
        outputs = []
        for index, hidden in enumerate(steps):
            if index == 4:
                session.rollback(7)
            if index == lose_at:
                await drop(swarm, session, 0)
                await drop(swarm, session, -1)
            order = torch.tensor([1, 0]) if index == 2 else None
            outputs.append(await session.step(hidden, hypo_ids=order))
        assert (session.failures >= 2) == (lose_at is not None)
        await session.close()
        return outputs

    expected = await run(None)
    for got, wanted in zip(await run(moment), expected, strict=True):
        tolerance = 0.0 if exact else 1e-4
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    for peer in swarm.peers:
        if peer.server is not None:
            await all_leases_returned(peer)


async def test_words_go_on_when_servers_leave(make_swarm: MakeSwarm, smollm: Truth) -> None:
    swarm = make_swarm()
    client = await swarm.add()
    spare = [await swarm.add(blocks) for blocks in (range(15), range(15, 30))]
    stream = await client.generate("A cat sat on", options=GenerationOptions(max_new_tokens=24))
    got: list[int] = []
    async for token in stream:
        got.append(token.id)
        if len(got) == 4:
            await swarm.add(range(20))
            await swarm.add(range(20, 30))
            await swarm.add(range(15, 20))
        if len(got) == 8:
            await swarm.stop(spare[0])
        if len(got) == 12:
            await swarm.stop(spare[1])
    inputs = smollm.tokenizer("A cat sat on", return_tensors="pt")
    expected = smollm.model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert got == expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert {hop.peer_id for hop in stream.route}.isdisjoint({peer.peer_id for peer in spare})


async def test_when_nobody_is_left_the_error_names_the_blocks(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    await swarm.add(range(2))
    await swarm.add(range(2, 4))
    client = await bootstrap.client()
    await client.ready()
    session = await client.open_session(client.blocks, 1, 8)
    hidden = torch.zeros(1, 1, client.checkpoint.hidden_size)
    await session.step(hidden)
    await drop(swarm, session, 1)
    with trio.fail_after(60), pytest.raises(MissingBlocks) as caught:
        await session.step(hidden)
    assert caught.value.blocks == (2, 3)
    await session.close()


async def test_gradients_are_those_of_the_unsplit_model_even_when_a_server_leaves(
    make_swarm: MakeSwarm, tiny_truth: Truth
) -> None:
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    for blocks in (range(3), range(3, 4), range(1), range(1, 4)):
        await swarm.add(blocks)
    client = await bootstrap.client()
    await client.ready()
    model = load_causal_lm(tiny_truth.checkpoint, client.chain())
    ids = torch.randint(3, 190, (3, 9), generator=torch.Generator().manual_seed(2))

    def gradient(which: torch.nn.Module) -> torch.Tensor:
        embeddings = which.get_input_embeddings()(ids).detach().requires_grad_()
        which(inputs_embeds=embeddings, labels=ids).loss.backward()
        assert embeddings.grad is not None
        return embeddings.grad

    expected = gradient(tiny_truth.model)
    assert_rounded(await client.portal.run_sync(gradient, model), expected, terms=2 * TINY)
    await swarm.stop(swarm.peers[1])
    assert_rounded(await client.portal.run_sync(gradient, model), expected, terms=2 * TINY)


async def test_a_server_that_restarts_under_its_name_is_used_again(
    make_swarm: MakeSwarm, tiny_truth: Truth, tmp_path: Path
) -> None:
    """It is the only one that holds its blocks, and has forgotten everything."""
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    await swarm.add(range(2))
    only = await swarm.add(range(2, 4), identity=tmp_path / "only.key")
    client = await bootstrap.client()
    await client.ready()
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(1, 2, client.checkpoint.hidden_size, generator=generator) for _ in range(4)]

    async def run(between: Callable[[], Awaitable[None]] | None) -> list[torch.Tensor]:
        session = await client.open_session(client.blocks, 1, 8)
        outputs = []
        for index, hidden in enumerate(steps):
            if index == 2 and between is not None:
                await between()
            outputs.append(await session.step(hidden))
        assert session.hops[-1].peer_id == only.peer_id
        await session.close()
        return outputs

    async def restart() -> None:
        await swarm.stop(only)
        again = await swarm.add(range(2, 4), identity=tmp_path / "only.key")
        assert again.peer_id == only.peer_id

    expected = await run(None)
    for got, wanted in zip(await run(restart), expected, strict=True):
        assert torch.equal(got, wanted)


async def test_half_an_answer_is_no_answer(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    """A server whose stream ends in the middle of a frame is replaced; what it had said does not count."""
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    await swarm.add(range(4))
    broken = await swarm.add(range(4), throughput=1000.0)
    client = await bootstrap.client()
    await client.ready()
    assert broken.server is not None

    async def half(messages: MessageStream, reply: Any, *payload: memoryview) -> None:
        frame = encode_frame(reply.SerializeToString()) + b"".join(bytes(piece) for piece in payload)
        await messages.stream.write(frame[: len(frame) // 2])
        await messages.stream.close()
        raise PeerUnreachable("half said", messages.remote_peer)

    session = await client.open_session(client.blocks, 1, 8)
    assert [hop.peer_id for hop in session.hops] == [broken.peer_id]
    hidden = torch.randn(1, 3, client.checkpoint.hidden_size)
    await session.step(hidden)
    object.__setattr__(broken.server.inbound, "_answer", half)
    got = await session.step(hidden)
    assert [hop.peer_id for hop in session.hops] == [swarm.peers[1].peer_id]
    await session.close()
    with LocalChain(load_span(tiny_truth.checkpoint, range(4))).open_session(batch_size=1, max_length=8) as local:
        local.step(hidden)
        assert torch.equal(got, local.step(hidden))


async def test_a_closed_port_ends_no_session_and_costs_newcomers_nothing(
    make_swarm: MakeSwarm, tiny_truth: Truth
) -> None:
    """As if a router forgot its rule: who is connected stays, who comes later goes to somebody else."""
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    shut = await swarm.add(range(4), throughput=1000.0)
    client = await bootstrap.client()
    await client.ready()
    session = await client.open_session(client.blocks, 1, 8)
    hidden = torch.randn(1, 2, client.checkpoint.hidden_size)
    await session.step(hidden)
    for door in shut.host._network.listeners.values():
        await door.close()
    open_one = await swarm.add(range(4))
    await session.step(hidden)
    assert [hop.peer_id for hop in session.hops] == [shut.peer_id]
    assert session.failures == 0
    newcomer = await (await swarm.add()).client()
    await newcomer.ready()
    other = await newcomer.open_session(newcomer.blocks, 1, 8)
    assert [hop.peer_id for hop in other.hops] == [open_one.peer_id]
    await other.step(hidden)
    await other.close()
    await session.close()


@pytest.mark.parametrize("tiny_truth", ["llama"], indirect=True)
async def test_an_opening_that_is_cut_off_gives_every_lease_back(
    make_swarm: Callable[..., Swarm], tiny_truth: Truth
) -> None:
    """One server has leased its cache, the other has not answered yet: found by benchmarks/soak.py."""
    swarm = make_swarm(tiny_truth.directory)
    quick, slow = await swarm.add(range(2)), await swarm.add(range(2, 4))
    client = await (await swarm.add()).client()
    await client.ready()

    async def never(stream: object) -> None:
        await trio.sleep_forever()

    slow.host.set_handler(INFERENCE_V1, never)
    assert quick.server is not None
    budget = quick.server.budget
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.open_session, client.blocks, 1, 16)
            while budget.left_bytes == budget.total_bytes:  # noqa: ASYNC110  # a poll of the state waited for
                await trio.sleep(0.001)
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.cancel_scope.cancel()
    await all_leases_returned(quick)
