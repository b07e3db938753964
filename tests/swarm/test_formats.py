"""Quantised checkpoints through two peers: the tokens of `transformers` on the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from petals.models.client.causal_lm import load_causal_lm
from petals.models.source.checkpoint import Checkpoint, open_checkpoint
from petals.peer.base.config import ServeConfig
from tests.models import test_gguf
from tests.models.packers import CASES
from tests.models.test_formats import DEEPSEEK, LLAMA, MOE, made, made_gpt_oss
from tests.models.tiny import Case
from tests.swarm.conftest import Swarm

MakeSwarm = Callable[..., Swarm]
Made = tuple[Any, Checkpoint]


def _case(form: str, case: Case) -> Callable[[Path], Made]:
    def make(room: Path) -> Made:
        reference, checkpoint = made(case, next(each for each in CASES if each.id == form), room)
        return reference.model, checkpoint

    return make


def _gpt_oss(room: Path) -> Made:
    reference, checkpoint = made_gpt_oss(room)
    return reference.model, checkpoint


def _gguf(kind: str, arch: str) -> Callable[[Path], Made]:
    def make(room: Path) -> Made:
        test_gguf.write(room / "model.gguf", kind, arch)
        truth = AutoModelForCausalLM.from_pretrained(room, gguf_file="model.gguf", dtype=torch.float32)
        return truth.eval(), open_checkpoint(room / "model.gguf", progress=lambda line: None)

    return make


MODELS = {
    **{case.id: _case(case.id, LLAMA) for case in CASES},
    "fp8-blocks, experts": _case("fp8-blocks", MOE),
    "fp8-blocks, DeepSeek": _case("fp8-blocks", DEEPSEEK),
    "awq, experts": _case("awq", MOE),
    "mxfp4, gpt-oss": _gpt_oss,
    **{f"gguf {kind}": _gguf(kind, "llama") for kind in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")},
    "gguf Q4_K, experts": _gguf("Q4_K", "qwen3moe"),
}


@pytest.mark.parametrize("name", MODELS)
async def test_two_peers_say_what_the_dequantised_model_says(
    name: str, make_swarm: MakeSwarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PETALS_CACHE", str(tmp_path / "cache"))
    truth, checkpoint = MODELS[name](tmp_path)
    path = tmp_path / "model.gguf" if name.startswith("gguf") else checkpoint.directory
    swarm, last = make_swarm(path), checkpoint.num_blocks
    first = await swarm.add(range(last - 1))
    await swarm.add(range(last - 1, last))
    client = await (await swarm.add()).client()
    await client.ready()
    model = load_causal_lm(checkpoint, client.chain(), dtype=torch.float32)
    model.generation_config.eos_token_id = truth.generation_config.eos_token_id = None
    ids = torch.tensor([[5, 2, 7, 3], [1, 2, 4, 6]])

    def compare() -> None:
        settings: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "input_ids": ids}
        ours, theirs = model.generate(**settings), truth.generate(**settings)
        torch.testing.assert_close(ours, theirs)
        with torch.no_grad():
            logits = truth(ids).logits
            limit = 5e-4 * float(logits.abs().max())
            torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=limit)

    await client.portal.run_sync(compare)
    assert first.server is not None
    plan = await first.plan(ServeConfig(blocks=range(last - 1), cache_bytes=1 << 20))
    # what float32 weights are kept in is not known before they are read: gpt-oss has some here
    rel = 0.5 if name == "mxfp4, gpt-oss" else 0.1
    assert plan.weight_bytes == pytest.approx(first.server.span.weight_bytes, rel=rel)
