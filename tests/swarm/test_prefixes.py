"""What an ended generation leaves at the servers: the next question costs only what is new, the same words come."""

from __future__ import annotations

from collections.abc import Callable

import torch
import trio

from petals.peer.client.generation.generation import TokenStream
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.client.model_client import ClientOptions
from petals.peer.node import Peer
from petals.protocols.prefixes import PREFIX_TOKENS
from tests.swarm.conftest import Swarm, Truth, all_leases_returned
from tests.tolerance import assert_rounded

MakeSwarm = Callable[..., Swarm]

FIRST = (
    "A swarm of peers answers questions, politely and at length, one after another. "
    "Question: which animal sat on the mat, and why did it sit there and nowhere else? Answer:"
)
SECOND = " Question: and what did the dog say about it? Answer:"


async def ask(peer: Peer, prompt: str, client: ClientOptions | None = None) -> TokenStream:
    stream = await peer.generate(prompt, options=GenerationOptions(max_new_tokens=24), client=client)
    async for _ in stream:
        pass
    return stream


def truth_of(truth: Truth, prompt: str) -> list[int]:
    inputs = truth.tokenizer(prompt, return_tensors="pt")
    output = truth.model.generate(**inputs, max_new_tokens=24, do_sample=False)
    ids: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


async def test_a_second_question_is_told_only_what_is_new(make_swarm: MakeSwarm, smollm: Truth) -> None:
    swarm = make_swarm()
    servers = [await swarm.add(range(15)), await swarm.add(range(15, 30))]
    client = await swarm.add()
    first = await ask(client, FIRST)
    assert first.reused_tokens == 0
    told = FIRST + first.text + SECOND
    second = await ask(client, told)
    assert second.reused_tokens >= PREFIX_TOKENS
    assert second.reused_tokens % PREFIX_TOKENS == 0
    assert len(first.prompt_ids) + len(first.token_ids) - second.reused_tokens < 2 * PREFIX_TOKENS
    assert second.token_ids == truth_of(smollm, told)
    again = await ask(client, told)
    assert again.reused_tokens >= second.reused_tokens
    assert again.token_ids == second.token_ids
    for server in servers:
        assert server.server is not None
        assert server.server.inbound.prefixes is not None
        assert server.server.inbound.prefixes.hits == 2
        await all_leases_returned(server)


async def test_another_client_finds_nothing_unless_the_operator_shares(make_swarm: MakeSwarm, smollm: Truth) -> None:
    for shared in (False, True):
        swarm = make_swarm()
        await swarm.add(range(30), share_prefixes=shared)
        one, other = await swarm.add(), await swarm.add()
        first = await ask(one, FIRST)
        theirs = await ask(other, FIRST)
        assert (theirs.reused_tokens > 0) is shared
        assert theirs.token_ids == first.token_ids


async def test_who_does_not_want_it_or_computes_the_same_bits_keeps_nothing(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    server = await swarm.add(range(30))
    client = await swarm.add()
    without = ClientOptions(prefix_cache=False)
    await ask(client, FIRST, without)
    assert (await ask(client, FIRST)).reused_tokens == 0
    assert (await ask(client, FIRST, without)).reused_tokens == 0
    assert (await ask(client, FIRST)).reused_tokens > 0
    assert server.server is not None
    await swarm.stop(server)
    exact = await swarm.add(range(30), deterministic=True)
    assert exact.server is not None
    assert exact.server.inbound.prefixes is None
    await ask(client, FIRST)
    assert (await ask(client, FIRST)).reused_tokens == 0


async def test_a_server_lost_after_the_kept_beginning_costs_no_token(make_swarm: MakeSwarm, smollm: Truth) -> None:
    """The replacement knows nothing of the prefix: its inputs are computed again by the blocks before."""
    swarm = make_swarm()
    await swarm.add(range(15))
    mine = await swarm.add(range(15, 30))
    client = await swarm.add()
    first = await ask(client, FIRST)
    told = FIRST + first.text + SECOND
    await swarm.add(range(15, 30))
    stream = await client.generate(told, options=GenerationOptions(max_new_tokens=24))
    killed = False
    async for _ in stream:
        if not killed:
            assert stream.reused_tokens > 0
            holder = next(peer for peer in swarm.peers if peer.peer_id == stream.route[1].peer_id)
            assert holder is mine, "the session went to the server that had kept the prefix"
            await swarm.stop(holder)
            killed = True
    assert killed
    assert stream.token_ids == truth_of(smollm, told)


async def test_a_kept_beginning_gives_the_numbers_of_the_whole(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    """Below the generation: a session that begins with what another left computes the same hidden states."""
    from petals.models.client.generation import first_block_inputs
    from petals.peer.client.model_client import Prefix
    from petals.protocols.prefixes import prefix_names

    swarm = make_swarm(str(tiny_truth.directory))
    await swarm.add(range(4))
    peer = await swarm.add()
    client = await peer.client()
    await client.ready()
    model = await trio.to_thread.run_sync(client.load_model, "causal_lm")
    ids = torch.randint(3, 90, (1, 75), generator=torch.Generator().manual_seed(0))
    hidden = first_block_inputs(model, ids)
    names = tuple(prefix_names(ids[0].tolist()))
    prefix = Prefix(names, lambda: hidden)
    one = await client.open_session(range(4), 1, 80, prefix=prefix)
    whole = await one.step(hidden)
    await one.close(names)
    two = await client.open_session(range(4), 1, 80, prefix=prefix)
    assert two.position == 64
    assert_rounded(await two.step(hidden[:, 64:]), whole[:, 64:])
    two.rollback(40)
    assert_rounded(await two.step(hidden[:, 40:]), whole[:, 40:])
    await two.close()
