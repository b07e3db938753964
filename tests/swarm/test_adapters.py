"""LoRA adapters hosted by servers: the swarm's answer is PEFT's on the unsplit model; others are not touched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM

from petals.models.blocks.block import BlockSpan
from petals.models.client.causal_lm import load_causal_lm
from petals.peer.client.model_client import ClientOptions
from petals.protocols.errors import MissingBlocks
from tests.swarm.conftest import Swarm, Truth
from tests.tolerance import assert_rounded

TARGETS = {"llama": ["q_proj", "v_proj"], "bloom": ["query_key_value"]}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
async def test_an_adapter_is_applied_where_it_is_asked_for(
    make_swarm: Callable[..., Swarm], tiny_truth: Truth, tmp_path: Path
) -> None:
    import peft

    directory = tmp_path / "poet"
    settings = peft.LoraConfig(r=3, target_modules=TARGETS[tiny_truth.model.config.model_type], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_truth.directory), settings).eval()
    with torch.no_grad():
        for index, (name, factor) in enumerate(tuned.named_parameters()):
            if "lora_" in name:
                factor.copy_(0.3 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(index)))
    tuned.save_pretrained(str(directory))

    swarm = make_swarm(tiny_truth.directory)
    await swarm.add(range(4))  # knows no adapter, and is never asked for one
    await swarm.add(range(3), adapters=(directory,))
    await swarm.add(range(3, 4), adapters=(directory,))
    client = await (await swarm.add()).client()
    await client.ready()
    ids = torch.tensor([[5, 17, 99, 3]])

    def compare() -> None:
        poet = load_causal_lm(tiny_truth.checkpoint, client.chain(ClientOptions(active_adapter="poet")))
        plain = load_causal_lm(tiny_truth.checkpoint, client.chain())
        with torch.no_grad():
            expected = tuned(input_ids=ids).logits
            assert_rounded(poet(ids).logits, expected)
            assert_rounded(plain(ids).logits, tiny_truth.model(ids).logits)
            assert float((expected - tiny_truth.model(ids).logits).abs().max()) > 0.01
        settings = {"max_new_tokens": 10, "do_sample": False}
        assert torch.equal(poet.generate(ids, **settings), tuned.generate(input_ids=ids, **settings))

    await client.portal.run_sync(compare)
    with trio.fail_after(30), pytest.raises(MissingBlocks):
        await client.open_session(client.blocks, 1, 8, ClientOptions(active_adapter="nobody hosts this"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("tiny_truth", ["llama"], indirect=True)
async def test_those_who_ask_for_adapters_share_passes(
    make_swarm: Callable[..., Swarm], tiny_truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    shared: list[list[object]] = []
    step_together = BlockSpan.step_together

    def count(span: BlockSpan, hidden: Any, caches: Any, masks: Any, adapters: Any) -> list[torch.Tensor]:
        shared.append(list(adapters))
        return step_together(span, hidden, caches, masks, adapters)

    whole, directories = {"plain": tiny_truth.model}, []
    for seed, name in enumerate(("poet", "cook")):
        settings = peft.LoraConfig(r=3, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
        base = AutoModelForCausalLM.from_pretrained(tiny_truth.directory)
        whole[name] = tuned = peft.get_peft_model(base, settings).eval()
        with torch.no_grad():
            for index, (factor_name, factor) in enumerate(tuned.named_parameters()):
                if "lora_" in factor_name:
                    generator = torch.Generator().manual_seed(100 * seed + index)
                    factor.copy_(0.3 * torch.randn(factor.shape, generator=generator))
        directories.append(tmp_path / name)
        tuned.save_pretrained(str(directories[-1]))
    swarm = make_swarm(tiny_truth.directory)
    await swarm.add(range(4), adapters=tuple(directories))
    monkeypatch.setattr(BlockSpan, "step_together", count)  # now: loading tries a pass of its own
    client = await (await swarm.add()).client()
    await client.ready()
    ids = torch.tensor([[5, 17, 99, 3]])
    settings = {"max_new_tokens": 24, "do_sample": False}
    answers: dict[str, list[torch.Tensor]] = {name: [] for name in whole}

    async def ask_for(name: str) -> None:
        chain = client.chain(ClientOptions(active_adapter=None if name == "plain" else name))
        model = load_causal_lm(tiny_truth.checkpoint, chain)
        answers[name].append(await client.portal.run_sync(partial(model.generate, ids, **settings)))

    async with trio.open_nursery() as nursery:
        for name in (*whole, *whole):
            nursery.start_soon(ask_for, name)
    for name, model in whole.items():
        for answer in answers[name]:
            assert torch.equal(answer, model.generate(input_ids=ids, **settings))
    assert not torch.equal(answers["poet"][0], answers["cook"][0])
    assert any(len(set(adapters)) > 1 for adapters in shared)


async def test_peers_choose_the_blocks_that_are_missing(make_swarm: Callable[..., Swarm], tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    first = await swarm.add(range(1))
    second = await swarm.add(num_blocks=2)
    third = await swarm.add(num_blocks=1)
    held = [peer.server.span.blocks for peer in (first, second, third) if peer.server is not None]
    assert sorted(block for blocks in held for block in blocks) == [0, 1, 2, 3]
