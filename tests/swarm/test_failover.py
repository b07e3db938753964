"""A server that leaves in the middle costs time, never a token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import trio

from petals.models.causal_lm import load_causal_lm
from petals.peer.client.generation import GenerationOptions
from petals.peer.client.model_client import ClientOptions
from petals.peer.client.session import RemoteSession
from petals.protocols.errors import MissingBlocks
from tests.swarm.conftest import Swarm, Truth, all_leases_returned

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
    torch.testing.assert_close(await client.portal.run_sync(gradient, model), expected, rtol=1e-4, atol=1e-6)
    await swarm.stop(swarm.peers[1])
    torch.testing.assert_close(await client.portal.run_sync(gradient, model), expected, rtol=1e-4, atol=1e-6)
