"""LoRA adapters by the name of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import trio
from transformers import AutoModelForCausalLM

from petals.gateway.config import HttpConfig
from petals.gateway.server import open_gateway
from tests.gateway.conftest import Door
from tests.gateway.scripted import save_scripted
from tests.swarm.conftest import Swarm

IDS = [5, 17, 99, 3]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
async def test_an_adapter_is_a_model_of_its_own(make_swarm: Callable[..., Swarm], tmp_path: Path) -> None:
    base = save_scripted(tmp_path / "base")
    settings = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).eval()
    with torch.no_grad():
        for index, (name, factor) in enumerate(tuned.named_parameters()):
            if "lora_" in name:
                factor.copy_(2 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(index)))
    tuned.save_pretrained(str(tmp_path / "poet"))
    wanted = tuned.generate(input_ids=torch.tensor([IDS]), max_new_tokens=6, do_sample=False)[0, len(IDS) :].tolist()

    swarm = make_swarm(base)
    server = await swarm.add(range(2), adapters=(tmp_path / "poet",))
    asker = await swarm.add()
    async with open_gateway(asker, HttpConfig(bind="127.0.0.1:0")) as url:
        door = Door(url, server, asker)
        with trio.fail_after(30):
            while len(listed := (await door.get("/v1/models")).json()["data"]) < 2:  # noqa: ASYNC110
                await trio.sleep(0.01)  # a poll of the state waited for: the record has come
        plain, poet = (each["id"] for each in listed)
        assert poet == f"{plain}:poet"
        assert listed[1]["parent"] == plain
        told = {}
        for model in (plain, poet):
            body = {"model": model, "prompt": IDS, "max_tokens": 6, "logprobs": 1}
            answer = (await door.post("/v1/completions", body)).json()
            assert answer["model"] == model
            told[model] = answer["choices"][0]["logprobs"]["tokens"]
        tokenizer = (await asker.checkpoint()).tokenizer()
        ended = wanted.index(2) + 1 if 2 in wanted else len(wanted)
        assert told[poet] == [tokenizer.decode([each]) for each in wanted[:ended]]
        assert told[poet] != told[plain]
        unknown = await door.post("/v1/completions", {"model": f"{plain}:nobody", "prompt": "x"})
        assert unknown.status_code == 404
        assert poet in unknown.json()["error"]["message"]
        await trio.to_thread.run_sync(door.client.close)
