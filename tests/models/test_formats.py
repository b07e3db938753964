"""Checkpoints that are quantised already: served in their own bits, with the numbers that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from petals.models.blocks.block import BlockSpan
from petals.models.source.checkpoint import Checkpoint, open_checkpoint
from petals.models.source.loading import load_span
from tests.models.packers import CASES, FormatCase, mxfp4, quantise, write
from tests.models.tiny import Case, Reference, make_model

WIDE = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 448,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA = Case("llama", "llama", "", WIDE)
MOE = Case("moe", "qwen3_moe", "", {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192})
DEEPSEEK = Case(
    "deepseek",
    "deepseek_v3",
    "",
    {
        **WIDE,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 192,
        "first_k_dense_replace": 1,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "head_dim": 32,
    },
)
GPT_OSS = Case(
    "gpt-oss",
    "gpt_oss",
    "",
    {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 192, "sliding_window": 5},
)
EXPERT_CASES = {"fp8-blocks", "gptq-4", "awq", "compressed-int4", "compressed-fp8", "bitsandbytes-nf4"}


def in_checkpoint(model: PreTrainedModel, directory: Path) -> dict[str, Tensor]:
    """The model's weights, named as its checkpoints are: experts one by one."""
    model.save_pretrained(directory)
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def with_weights(model: PreTrainedModel, state: dict[str, Tensor], directory: Path) -> Reference:
    """The same model with other weights, loaded by `transformers` in float32: the truth."""
    model.save_pretrained(directory)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")
    return Reference(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())


def check_against(reference: Reference, checkpoint: Checkpoint, *, tolerance: float = 2e-4) -> BlockSpan:
    """Blocks, in one go and in steps, and the gradient, against the truth."""
    span = load_span(checkpoint, range(checkpoint.num_blocks), dtype=torch.float32)
    ids = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden, _ = reference.run(ids)
    limit = {"rtol": tolerance, "atol": tolerance * float(hidden[-1].abs().max())}
    assert_close(span.forward(hidden[0], span.blocks), hidden[-1], **limit)
    cache = span.new_cache(span.blocks, 2, 9)
    steps = [span.step(hidden[0][:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 9))]
    assert_close(torch.cat(steps, 1), hidden[-1], **limit)
    outer = torch.randn(hidden[-1].shape, generator=torch.Generator().manual_seed(1))
    inputs = hidden[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad((span.forward(inputs, span.blocks) * outer).sum(), [inputs])
    _, expected = reference.gradients(ids, hidden[0], None, outer)
    assert_close(grad, expected, rtol=tolerance, atol=10 * tolerance * float(expected.abs().max()))
    return span


def file_bytes(checkpoint: Checkpoint) -> int:
    names = [name for block in range(checkpoint.num_blocks) for name, _ in checkpoint.block_tensors(block)]
    return sum(checkpoint.entry(name).nbytes for name in names)


def made(case: Case, form: FormatCase, tmp_path: Path) -> tuple[Reference, Checkpoint]:
    model = make_model(case.config())
    wide = quantise(model, form, tmp_path / "packed", in_checkpoint(model, tmp_path / "plain"))
    return with_weights(model, wide, tmp_path / "truth"), open_checkpoint(tmp_path / "packed")


@pytest.mark.parametrize("form", CASES, ids=lambda form: form.id)
def test_linear_layers(form: FormatCase, tmp_path: Path) -> None:
    reference, checkpoint = made(LLAMA, form, tmp_path)
    span = check_against(reference, checkpoint)
    assert span.weight_bytes <= 1.15 * file_bytes(checkpoint), "float32 vectors and float32 scales included"


@pytest.mark.parametrize("form", [form for form in CASES if form.id in EXPERT_CASES], ids=lambda form: form.id)
def test_experts_that_are_matrices_of_their_own(form: FormatCase, tmp_path: Path) -> None:
    reference, checkpoint = made(MOE, form, tmp_path)
    span = check_against(reference, checkpoint)
    assert span.weight_bytes <= 1.15 * file_bytes(checkpoint)


def test_deepseek_in_blocks(tmp_path: Path) -> None:
    """192 rows are a block and a half, 96 less than one: transformers 5.23 divides, and is wrong by half."""
    reference, checkpoint = made(DEEPSEEK, CASES[0], tmp_path)
    check_against(reference, checkpoint)


def test_gpt_oss(tmp_path: Path) -> None:
    model = make_model(GPT_OSS.config())
    stored, wide = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in in_checkpoint(model, tmp_path / "plain").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parts, wide[name] = mxfp4(tensor.float())
            stored.update({name + suffix: part for suffix, part in parts.items()})
        else:
            stored[name] = wide[name] = tensor
    write(tmp_path / "packed", model, {"quant_method": "mxfp4"}, stored)
    reference = with_weights(model, wide, tmp_path / "truth")
    span = check_against(reference, open_checkpoint(tmp_path / "packed"))
    assert span.weight_bytes <= 1.15 * file_bytes(open_checkpoint(tmp_path / "packed"))
