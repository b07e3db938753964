"""What Petals' own tests check and no other test here did; docs/migrating.md has the list of all of them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import set_seed

from petals import AutoDistributedConfig, AutoDistributedModelForCausalLM, RemoteSequential
from petals.compat.blocks import load_pretrained_block
from petals.dht.records import open_record
from petals.models.client.local import LocalChain
from petals.models.source.loading import load_span
from petals.peer.base.identity import verify
from petals.peer.membership.record_exchange import fetch_record
from petals.peer.node import Peer
from tests.swarm.conftest import Swarm, Truth, all_leases_returned

MakeSwarm = Callable[..., Swarm]
IDS = torch.tensor([[5, 17, 99, 3], [8, 2, 45, 101]])


@pytest.fixture
async def swarm(make_swarm: MakeSwarm, tiny_truth: Truth) -> Swarm:
    """Two servers, and a peer that asks as the last one."""
    swarm = make_swarm(tiny_truth.directory)
    await swarm.add(range(3))
    await swarm.add(range(3, 4))
    await swarm.add()
    return swarm


async def opened(swarm: Swarm, **settings: Any) -> Any:
    return await AutoDistributedModelForCausalLM.afrom_pretrained(peer=swarm.peers[-1], **settings)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


async def test_servers_say_how_much_cache_is_left(swarm: Swarm, tiny_truth: Truth) -> None:
    server, peer = swarm.peers[0], swarm.peers[-1]
    client = await peer.client()
    await client.ready()

    async def left() -> int:
        data = await fetch_record(peer.host, server.peer_id, server.addrs, client.model)
        assert data is not None
        return open_record(data, now=time.time(), verify=verify).cache_tokens_left

    before = await left()
    session = await client.open_session(client.blocks, 2, 16)
    assert await left() == before - 2 * 16, "a token of one row on all of its blocks is one"
    await session.close()
    await all_leases_returned(server)
    assert await left() == before


async def test_compression_loses_a_little_and_none_loses_nothing(swarm: Swarm, tiny_truth: Truth) -> None:
    local = LocalChain(load_span(tiny_truth.checkpoint, range(4)))
    hidden = noise(2, 5, local.hidden_size)

    def outcome(h: Any) -> tuple[Tensor, Tensor]:
        inputs = hidden.clone().requires_grad_()
        output: Tensor = h(inputs)
        output.square().mean().backward()
        assert inputs.grad is not None
        return output.detach(), inputs.grad

    exact = outcome(local.forward)
    for compression, low, high in (("none", 0.0, 1e-5), ("float16", 1e-7, 1e-2), ("int8", 1e-4, 0.15)):
        model = await opened(swarm, compression=compression)
        for ours, theirs in zip(await model.run(outcome, model.transformer.h), exact, strict=True):
            error = float((ours - theirs).norm() / theirs.norm())
            assert low <= error <= high, compression


async def test_a_part_of_the_blocks_and_its_gradients(swarm: Swarm, tiny_truth: Truth) -> None:
    local = LocalChain(load_span(tiny_truth.checkpoint, range(4)))
    config = AutoDistributedConfig.from_pretrained(tiny_truth.directory)
    peer = swarm.peers[-1]

    def compare() -> None:
        part = RemoteSequential(config, dht=peer, start_block=1, end_block=4)
        for prompts in (None, noise(3, 2, 2, local.hidden_size, seed=3)):
            results = []
            for stack in (part, local.slice(range(1, 4)).forward):
                inputs = noise(2, 5, local.hidden_size, seed=2).requires_grad_()
                mine = None if prompts is None else prompts.clone().requires_grad_()
                output = stack(inputs) if mine is None else stack(inputs, prompts=mine)
                output.square().sum().backward()
                results.append([output.detach(), inputs.grad, None if mine is None else mine.grad])
            for ours, theirs in zip(*results, strict=True):
                if theirs is not None:
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        hidden, prompts = noise(2, 5, local.hidden_size), noise(3, 2, 4, local.hidden_size)
        expected = local.slice(range(1, 4)).forward(hidden, prompts=prompts)
        with torch.no_grad(), part.inference_session(max_length=5) as session:
            stepped = [session.step(hidden[:, :4], prompts), session.step(hidden[:, 4:])]
        torch.testing.assert_close(torch.cat(stepped, dim=1), expected, rtol=0, atol=1e-4)

    await peer.portal.run_sync(compare)


async def test_steps_of_nothing_change_nothing_and_too_many_are_a_value_error(swarm: Swarm, tiny_truth: Truth) -> None:
    model = await opened(swarm)
    expected = tiny_truth.model(IDS).logits.detach()

    @torch.no_grad()
    def walk() -> None:
        h, head = model.transformer.h, model.lm_head
        hidden = model.transformer.word_embeddings_layernorm(model.transformer.word_embeddings(IDS))
        nothing = hidden[:, :0]
        with h.inference_session(max_length=4) as session:
            steps = [session.step(nothing)]
            for index in range(4):
                steps += [session.step(hidden[:, index : index + 1]), session.step(nothing)]
            with pytest.raises(ValueError, match="max_length of 4"):
                session.step(hidden[:, :1])
            assert session.position == 4
        assert steps[0].shape == nothing.shape
        logits = head(model.transformer.ln_f(torch.cat(steps, dim=1)))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)

    await model.run(walk)


SAMPLING = [
    {"do_sample": True, "temperature": 0.7},
    {"do_sample": True, "top_k": 7},
    {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.2},
    {"do_sample": False, "num_beams": 3},
    {"do_sample": False, "max_length": 10},
    {"do_sample": 0},
]


@pytest.mark.parametrize("settings", SAMPLING, ids=" ".join)
async def test_words_are_those_of_transformers_in_one_call_and_in_several(
    swarm: Swarm, tiny_truth: Truth, settings: dict[str, Any]
) -> None:
    model = await opened(swarm)
    length = {} if "max_length" in settings else {"max_new_tokens": 6}

    def seeded(generate: Any, *args: Any, **kwargs: Any) -> Tensor:
        set_seed(3)
        said: Tensor = generate(*args, eos_token_id=None, **kwargs)
        return said

    def compare() -> None:
        for ids in (IDS[:1], IDS):
            expected = seeded(tiny_truth.model.generate, ids, **settings, **length)
            assert torch.equal(seeded(model.generate, ids, **settings, **length), expected)
        if "num_beams" in settings or "max_length" in settings:
            return
        set_seed(3)
        with model.inference_session(max_length=12):
            parts = [model.generate(IDS, max_new_tokens=1, eos_token_id=None, **settings)]
            parts += [model.generate(max_new_tokens=count, eos_token_id=None, **settings) for count in (1, 2, 2)]
        assert torch.equal(torch.cat(parts, dim=1), expected)

    await model.run(compare)


def test_a_block_computes_in_the_dtype_that_was_asked_for(tiny_truth: Truth) -> None:
    for asked, got in (
        (torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16),
        ("auto", tiny_truth.checkpoint.dtype),
    ):
        assert load_pretrained_block(str(tiny_truth.directory), 0, torch_dtype=asked).chain.dtype is got


def test_bitsandbytes_is_imported_by_nobody_who_does_not_quantise(tiny_truth: Truth) -> None:
    program = (
        "import sys, torch, petals\n"
        "from petals.compat.blocks import load_pretrained_block\n"
        f"block = load_pretrained_block({str(tiny_truth.directory)!r}, 1, torch_dtype=torch.float32)\n"
        "block(torch.zeros(1, 2, block.chain.hidden_size))\n"
        "from petals import AutoDistributedModelForCausalLM\n"
        "sys.exit('bitsandbytes' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr


async def test_the_loss_for_labels_is_that_of_transformers(swarm: Swarm, tiny_truth: Truth) -> None:
    model = await opened(swarm)

    def loss() -> float:
        return float(model(IDS, labels=IDS).loss.detach())

    assert await model.run(loss) == pytest.approx(float(tiny_truth.model(IDS, labels=IDS).loss.detach()), abs=1e-4)


async def test_peers_of_one_process_share_a_directory(swarm: Swarm) -> None:
    """`dht=` takes a peer that is open: two models use one."""
    peer: Peer = swarm.peers[-1]
    first, second = await opened(swarm), await opened(swarm)
    assert first.portal is second.portal is peer.portal
    open_model = partial(AutoDistributedModelForCausalLM.from_pretrained, dht=peer)
    assert (await peer.portal.run_sync(open_model)).portal is peer.portal
