"""LoRA adapters hosted by servers: the swarm's answer is PEFT's on the unsplit model; others are not touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM

from petals.models.causal_lm import load_causal_lm
from petals.peer.client.model_client import ClientOptions
from petals.protocols.errors import MissingBlocks
from tests.swarm.conftest import Swarm, Truth

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
            torch.testing.assert_close(poet(ids).logits, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(plain(ids).logits, tiny_truth.model(ids).logits, rtol=0, atol=1e-4)
            assert float((expected - tiny_truth.model(ids).logits).abs().max()) > 0.01
        settings = {"max_new_tokens": 10, "do_sample": False}
        assert torch.equal(poet.generate(ids, **settings), tuned.generate(input_ids=ids, **settings))

    await client.portal.run_sync(compare)
    with trio.fail_after(30), pytest.raises(MissingBlocks):
        await client.open_session(client.blocks, 1, 8, ClientOptions(active_adapter="nobody hosts this"))


async def test_peers_choose_the_blocks_that_are_missing(make_swarm: Callable[..., Swarm], tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    first = await swarm.add(range(1))
    second = await swarm.add(num_blocks=2)
    third = await swarm.add(num_blocks=1)
    held = [peer.server.span.blocks for peer in (first, second, third) if peer.server is not None]
    assert sorted(block for blocks in held for block in blocks) == [0, 1, 2, 3]
