"""The promise: the words of the swarm are exactly those of the unsplit model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM

from petals.models.blocks.block import BlockSpan
from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.local import LocalChain
from petals.models.source.loading import load_span
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.client.model_client import ClientOptions
from petals.peer.node import Peer
from petals.protocols.errors import MissingBlocks, UserError
from tests.models.tiny import CASES, VOCABULARY, save_tiny
from tests.swarm.conftest import Swarm, Truth, all_leases_returned
from tests.tolerance import assert_rounded

MakeSwarm = Callable[..., Swarm]
PROMPTS = ("A cat sat on", "The three primary colours are", "def fibonacci(n):")
SPLITS = {1: (30,), 2: (15, 30), 3: (7, 20, 30)}


async def ask(peer: Peer, prompt: str, **options: Any) -> list[int]:
    stream = await peer.generate(prompt, options=GenerationOptions(**options))
    return [token.id async for token in stream]


@cache
def truth_of(truth: Truth, prompt: str, **options: Any) -> list[int]:
    inputs = truth.tokenizer(prompt, return_tensors="pt")
    output = truth.model.generate(**inputs, **options)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("n_peers", [1, 2, 3])
async def test_a_real_model_says_the_same_words_however_it_is_split(
    make_swarm: MakeSwarm, smollm: Truth, n_peers: int
) -> None:
    swarm, start = make_swarm(), 0
    for end in SPLITS[n_peers]:
        await swarm.add(range(start, end))
        start = end
    client = await swarm.add()
    for prompt in PROMPTS:
        expected = truth_of(smollm, prompt, max_new_tokens=64, do_sample=False)
        assert await ask(client, prompt, max_new_tokens=64) == expected
        assert len(set(expected)) > 10, "a model that repeats itself proves nothing"
    for server in swarm.peers[:-1]:
        await all_leases_returned(server)


async def test_seeded_sampling_throws_the_same_dice(make_swarm: MakeSwarm, smollm: Truth) -> None:
    swarm = make_swarm()
    await swarm.add(range(12))
    client = await swarm.add(range(12, 30))  # serves and asks at once
    settings = {"max_new_tokens": 24, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
    torch.manual_seed(7)
    expected = truth_of(smollm, PROMPTS[0], do_sample=True, **settings)

    async def disturb(seed: int | None) -> None:
        await ask(client, PROMPTS[1], max_new_tokens=24, temperature=0.9, seed=seed)

    done = threading.Event()

    def draw() -> None:  # as the program around us may, from the generator that all of the process share
        while not done.is_set():
            torch.rand(())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(disturb, 8)
        nursery.start_soon(disturb, None)
        nursery.start_soon(trio.to_thread.run_sync, draw)
        try:
            assert await ask(client, PROMPTS[0], seed=7, **settings) == expected
        finally:
            done.set()
    assert await ask(client, PROMPTS[0], seed=9, **settings) != expected


async def test_text_streams_and_the_route_is_told(make_swarm: MakeSwarm, smollm: Truth) -> None:
    swarm = make_swarm()
    server = await swarm.add(range(30))
    client = await swarm.add()
    stream = await client.generate(PROMPTS[0], options=GenerationOptions(max_new_tokens=20))
    seen = ""
    async for token in stream:
        seen += token.text
    assert seen == stream.text == smollm.tokenizer.decode(stream.token_ids)
    assert [(hop.peer_id, hop.blocks) for hop in stream.route] == [(server.peer_id, range(30))]
    assert 0 < stream.route[0].compute_s <= stream.route[0].round_trip_s
    assert stream.tokens_per_s > 0
    rounded = ClientOptions(head_quant="int8")  # of this generation; who does not ask for it keeps an exact head
    stream = await client.generate(PROMPTS[0], options=GenerationOptions(max_new_tokens=2), client=rounded)
    assert len([token async for token in stream]) == 2
    asking = await client.client()
    heads = [(await asking.language_model(quant))[0].get_output_embeddings() for quant in ("int8", "none")]
    assert [head.weight.dtype for head in heads] == [torch.int8, torch.float32]


async def test_random_models_generate_the_same_in_every_way(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    await swarm.add(range(3))
    await swarm.add(range(3, 4))
    client = await (await swarm.add()).client()
    await client.ready()
    model = load_causal_lm(tiny_truth.checkpoint, client.chain())
    ids = torch.tensor([[5, 17, 99, 3], [8, 2, 45, 101]])
    padded = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])

    def compare() -> None:
        for arguments in (
            {"input_ids": ids},
            {"input_ids": ids, "attention_mask": padded},
            {"input_ids": ids, "num_beams": 3},
            {"input_ids": ids[:1], "repetition_penalty": 1.3},
        ):
            settings = {"max_new_tokens": 12, "do_sample": False, **arguments}
            torch.testing.assert_close(model.generate(**settings), tiny_truth.model.generate(**settings))
        with torch.no_grad():
            assert_rounded(model(ids).logits, tiny_truth.model(ids).logits)

    await client.portal.run_sync(compare)


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3", "mixtral", "gpt2"])
async def test_many_at_once_share_passes_and_read_what_each_reads_alone(
    make_swarm: MakeSwarm, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = save_tiny(next(case for case in CASES if case.id == family), tmp_path)
    shared: list[tuple[int, bool]] = []
    step_together = BlockSpan.step_together

    def count(span: BlockSpan, hidden: Any, caches: Any, masks: Any, adapters: Any) -> list[torch.Tensor]:
        shared.append((len(caches), any(mask is not None for mask in masks)))
        return step_together(span, hidden, caches, masks, adapters)

    swarm = make_swarm(str(tmp_path))
    await swarm.add(range(3))
    await swarm.add(range(3, 4))
    monkeypatch.setattr(BlockSpan, "step_together", count)  # now: loading tries a pass of its own
    client = await (await swarm.add()).client()
    await client.ready()
    dice = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, VOCABULARY, (1 + number % 2, 3 + number), generator=dice) for number in range(6)]
    padding = [
        torch.arange(ids.shape[1]) >= torch.arange(len(ids))[:, None] for ids in prompts
    ]  # a token of the second

    def generate(model: Any, number: int) -> torch.Tensor:
        mask = padding[number].long()
        ids = prompts[number]
        out: torch.Tensor = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
        return out

    answers: dict[int, torch.Tensor] = {}

    async def ask_for(number: int) -> None:
        model = load_causal_lm(client.checkpoint, client.chain())
        answers[number] = await client.portal.run_sync(generate, model, number)

    async with trio.open_nursery() as nursery:
        for number in range(len(prompts)):
            nursery.start_soon(ask_for, number)
    for number in range(len(prompts)):
        assert torch.equal(answers[number], generate(reference, number))
    assert max(sessions for sessions, _ in shared) > 1
    assert any(padded for sessions, padded in shared if sessions > 1)


async def test_the_client_computes_in_the_dtype_of_its_servers(
    make_swarm: MakeSwarm, tiny_truth: Truth, tmp_path: Path
) -> None:
    copy.deepcopy(tiny_truth.model).to(torch.bfloat16).save_pretrained(str(tmp_path / "half"))
    ids = torch.tensor([[5, 17, 99, 3]])
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        truth = AutoModelForCausalLM.from_pretrained(str(tmp_path / "half"), dtype=expected).eval()
        swarm = make_swarm(tmp_path / "half")
        await swarm.add(range(3), dtype=dtype)
        await swarm.add(range(3, 4), dtype=dtype)
        client = await (await swarm.add()).client()
        await client.ready()
        model = load_causal_lm(client.checkpoint, client.chain(), dtype=client.dtype)
        assert model.dtype == expected
        got = await client.portal.run_sync(partial(model.generate, ids, **settings))
        assert got.tolist() == truth.generate(ids, **settings).tolist(), dtype


async def test_cancelling_gives_every_lease_back(make_swarm: MakeSwarm, smollm: Truth) -> None:
    swarm = make_swarm()
    servers = [await swarm.add(range(15)), await swarm.add(range(15, 30))]
    client = await swarm.add()
    with trio.CancelScope() as scope:
        async for _ in await client.generate(PROMPTS[0], options=GenerationOptions(max_new_tokens=500)):
            assert all(server.server.inbound.sessions == 1 for server in servers if server.server)
            scope.cancel()
    assert scope.cancelled_caught
    for server in servers:
        await all_leases_returned(server)
    assert await ask(client, PROMPTS[0], max_new_tokens=4) == truth_of(
        smollm, PROMPTS[0], max_new_tokens=4, do_sample=False
    )


async def test_leaving_the_loop_with_break_ends_the_generation(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    server = await swarm.add(range(30))
    client = await swarm.add()
    async for _ in await client.generate(PROMPTS[0], options=GenerationOptions(max_new_tokens=500)):
        break
    await all_leases_returned(server)


async def test_missing_blocks_are_named_in_bounded_time(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    await swarm.add(range(10))
    await swarm.add(range(20, 30))
    client = await swarm.add()
    with trio.fail_after(30), pytest.raises(MissingBlocks, match=r"10:20.*waited 8 s") as caught:
        await client.generate(PROMPTS[0])
    assert caught.value.blocks == tuple(range(10, 20))


async def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_sent(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    await swarm.add(range(30))
    client = await swarm.add()
    with pytest.raises(UserError, match="do not fit into 8"):
        await client.generate(PROMPTS[0], options=GenerationOptions(max_new_tokens=8, max_length=8))
    with pytest.raises(UserError, match="empty"):
        await client.generate("")
    assert await ask(client, PROMPTS[0], max_new_tokens=2)  # the peer is none the worse


async def test_token_ids_are_taken_as_they_are(make_swarm: MakeSwarm, smollm: Truth) -> None:
    server = await make_swarm().add(range(30))
    options = GenerationOptions(max_new_tokens=3)
    ids = smollm.tokenizer("A cat sat on")["input_ids"]
    by_text = await server.generate("A cat sat on", options=options)
    by_ids = await server.generate(ids, options=options)
    assert [token.id async for token in by_ids] == [token.id async for token in by_text]
    assert by_ids.prompt_ids == ids
    for nonsense in ([-1], [10**6], []):
        with pytest.raises(UserError, match="prompt"):
            await server.generate(nonsense, options=options)


async def test_a_long_prompt_lets_others_steps_through(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    """It is computed in pieces, with the same result up to rounding: padding, deep prompts and all."""
    swarm = make_swarm(tiny_truth.directory)
    server = await swarm.add(range(4), prefill_chunk_tokens=8)
    client = await (await swarm.add()).client()
    await client.ready()
    assert server.server is not None
    lane, submitted = server.server.lane, list[int]()
    submit = lane.submit

    async def counted(*args: Any, **kwargs: Any) -> Any:
        submitted.append(kwargs["cost"])
        return await submit(*args, **kwargs)

    object.__setattr__(lane, "submit", counted)
    hidden = torch.randn(2, 14, client.checkpoint.hidden_size, generator=torch.Generator().manual_seed(1))
    prompts = torch.randn(4, 2, 3, client.checkpoint.hidden_size, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[0, :5] = False
    session = await client.open_session(client.blocks, 2, 20)
    got = await session.step(hidden, attention_mask=mask, prompts=prompts)
    await session.close()
    assert submitted == [8, 8, 8, 4]
    whole = LocalChain(load_span(tiny_truth.checkpoint, range(4))).forward(hidden, attention_mask=mask, prompts=prompts)
    assert_rounded(got[mask], whole[mask])


async def test_a_prompt_goes_on_in_one_piece_when_nobody_else_decodes_any_more(
    make_swarm: MakeSwarm, tiny_truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_swarm(tiny_truth.directory)
    server = await swarm.add(range(4))
    client = await (await swarm.add()).client()
    await client.ready()
    assert server.server is not None
    pieces = iter([3, 512])  # the second is more than the whole step, and more than what is left of it
    monkeypatch.setattr(server.server.lane, "piece_rows", lambda visitor, most: next(pieces))
    hidden = torch.randn(1, 14, client.checkpoint.hidden_size, generator=torch.Generator().manual_seed(1))
    session = await client.open_session(client.blocks, 1, 20)
    got = await session.step(hidden)
    await session.close()
    whole = LocalChain(load_span(tiny_truth.checkpoint, range(4))).forward(hidden)
    assert_rounded(got, whole)


async def test_a_server_may_save_bytes(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    """Its answers are shorter than asked for, and say so; what it is told stays exact."""
    swarm = make_swarm(tiny_truth.directory)
    await swarm.add(range(4), compression="float16")
    client = await (await swarm.add()).client()
    await client.ready()
    model = load_causal_lm(tiny_truth.checkpoint, client.chain())
    ids = torch.tensor([[5, 17, 99, 3]])

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    exact = tiny_truth.model(ids).logits
    got = await client.portal.run_sync(logits)
    assert not torch.equal(got, exact)
    torch.testing.assert_close(got, exact, rtol=2e-3, atol=2e-2)
    settings = {"max_new_tokens": 8, "do_sample": False}
    said = await client.portal.run_sync(partial(model.generate, ids, **settings))
    assert torch.equal(said, tiny_truth.model.generate(ids, **settings))
