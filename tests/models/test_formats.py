"""Checkpoints that are quantised already: served in their own bits, with the numbers that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from petals.models.blocks.block import BlockSpan
from petals.models.errors import CheckpointError, ModelError
from petals.models.kernels import packed
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


def check_against(
    reference: Reference, checkpoint: Checkpoint, *, tolerance: float = 2e-4, vocabulary: int = 128
) -> BlockSpan:
    """Blocks, in one go and in steps, and the gradient, against the truth."""
    span = load_span(checkpoint, range(checkpoint.num_blocks), dtype=torch.float32)
    ids = torch.randint(1, vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))
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
    assert span.lean
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


def made_gpt_oss(tmp_path: Path) -> tuple[Reference, Checkpoint]:
    """Experts in MXFP4, the rest as it is."""
    model = make_model(GPT_OSS.config())
    stored, wide = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in in_checkpoint(model, tmp_path / "plain").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parts, wide[name] = mxfp4(tensor.float())
            stored.update({name + suffix: part for suffix, part in parts.items()})
        else:
            stored[name] = wide[name] = tensor
    write(tmp_path / "packed", model, {"quant_method": "mxfp4"}, stored)
    return with_weights(model, wide, tmp_path / "truth"), open_checkpoint(tmp_path / "packed")


def test_gpt_oss(tmp_path: Path) -> None:
    reference, checkpoint = made_gpt_oss(tmp_path)
    span = check_against(reference, checkpoint)
    assert span.weight_bytes <= 1.15 * file_bytes(checkpoint)


Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def damaged(form: str, change: Change, tmp_path: Path, case: Case = LLAMA) -> Checkpoint:
    """A checkpoint in a format, its tensors and its config.json changed."""
    _, checkpoint = made(case, next(each for each in CASES if each.id == form), tmp_path)
    tensors, path = load_file(checkpoint.directory / "model.safetensors"), checkpoint.directory / "config.json"
    config = json.loads(path.read_text())
    change(tensors, config)
    path.write_text(json.dumps(config))
    save_file(tensors, checkpoint.directory / "model.safetensors")
    return open_checkpoint(checkpoint.directory)


def drop(suffix: str) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del tensors[f"model.layers.1.mlp.up_proj{suffix}"]

    return change


def set_entry(**entries: Any) -> Change:
    return lambda tensors, config: config["quantization_config"].update(entries)


def replace_scales(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    tensors[name] = tensors[name].t().contiguous()


def spoil_a_code(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[3, 5] = 127


def forget_the_format(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del config["quantization_config"]


def shrink(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:, :-128].contiguous()


def mix_groups(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.g_idx"][:] = 0


def other_kinds(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"]["group_1"] = {"weights": {"num_bits": 8}}


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("fp8-blocks", set_entry(quant_method="made-up"), "quantised as 'made-up'; supported are fp8, "),
        ("fp8-blocks", set_entry(fmt="e5m2"), "only e4m3 is supported"),
        ("fp8-blocks", set_entry(weight_block_size=None), "no weight_block_size in its config.json"),
        ("fp8-blocks", set_entry(weight_block_size=[64, 64]), r"in blocks of \[64, 64\] have \(4, 7\)"),
        ("fp8-blocks", replace_scales, r"scales of shape \[2, 4\]"),
        ("fp8-blocks", drop(".weight_scale_inv"), "up_proj.weight is stored as F8_E4M3, and nothing says"),
        ("fp8-blocks", forget_the_format, "is stored as F8_E4M3, and nothing says"),
        ("fp8-blocks", spoil_a_code, "up_proj has weights that are no numbers"),
        ("fp8-blocks", shrink, r"up_proj is no FP8 weight: scales of shape \[4, 2\]"),
        ("gptq-4", set_entry(bits=3), "gptq in 3 bits; supported are 4 and 8"),
        ("gptq-4", drop(".qzeros"), r"up_proj is no GPTQ weight: lacks '\.qzeros'"),
        ("gptq-4", drop(".scales"), r"up_proj is no GPTQ weight: lacks '\.scales'"),
        ("gptq-4", mix_groups, "g_idx does not deal the inputs to equal groups"),
        ("awq", set_entry(version="gemv"), "only gemm is supported"),
        ("awq", drop(".qweight"), r"lacks block tensors: layers\.1\.mlp\.up_proj\.weight"),
        ("compressed-int4", set_entry(format="marlin-24"), "supported are pack-quantized"),
        ("compressed-int4", other_kinds, "2 kinds of quantised weights"),
        ("compressed-int8", drop(".weight_scale"), "is stored as I8, and nothing says"),
        ("bitsandbytes-int8", drop(".SCB"), "is stored as I8, and nothing says"),
        ("bitsandbytes-nf4", drop(".weight.absmax"), "is stored as U8, and nothing says"),
        ("bitsandbytes-nf4", drop(".weight.quant_map"), r"lacks '\.weight\.quant_map'"),
    ],
)
def test_a_defect_is_one_line(form: str, change: Change, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_span(damaged(form, change, tmp_path), range(3))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_first_shard_alone(tmp_path: Path) -> None:
    _, checkpoint = made(LLAMA, CASES[0], tmp_path)
    whole = checkpoint.directory / "model.safetensors"
    whole.rename(checkpoint.directory / "model-00001-of-00003.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds model-00001-of-00003\.safetensors, but no model\.safetensors\.index"
    ):
        load_span(open_checkpoint(checkpoint.directory), range(1))


def test_without_numba_the_server_says_that_it_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, checkpoint = made(LLAMA, CASES[0], tmp_path)
    for home in ("petals.models.source.loading", "petals.models.kernels.packed"):
        monkeypatch.setattr(f"{home}.usable", lambda: False)
    said: list[str] = []
    load_span(checkpoint, range(1), progress=said.append)
    assert said[0].startswith("FP8 weights are dequantised for every step")
    check_against(reference, checkpoint)


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model's own code imports when it is built."""
    _, checkpoint = made(LLAMA, CASES[0], tmp_path)

    def build(*args: object, **kwargs: object) -> None:
        raise ImportError("requires the kernels library\nsecond line")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.__init__", build)
    with pytest.raises(ModelError, match=r"it needs a Python package: requires the kernels library$"):
        load_span(checkpoint, range(1))


def test_weights_that_are_not_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that is wrong on this machine: the self-test reads the numbers again."""
    _, checkpoint = made(LLAMA, CASES[0], tmp_path)
    right = packed.Fp8Matrix.times
    monkeypatch.setattr(packed.Fp8Matrix, "times", lambda self, rows: right(self, rows).roll(1, -1))
    with pytest.raises(ModelError, match=r"block 0 multiplies by another self_attn\.q_proj than the checkpoint has"):
        load_span(checkpoint, range(1))


@pytest.mark.parametrize("quant_type", ["int8", "nf4"])
@pytest.mark.parametrize(("form", "case"), [("fp8-blocks", LLAMA), ("awq", MOE)])
def test_quantised_once_more(form: str, case: Case, quant_type: str, tmp_path: Path) -> None:
    _, checkpoint = made(case, next(each for each in CASES if each.id == form), tmp_path)
    own = load_span(checkpoint, range(1), dtype=torch.float32)
    again = load_span(checkpoint, range(1), dtype=torch.float32, quant_type=quant_type)
    hidden = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(3))
    ours, theirs = (span.forward(hidden, range(1)) for span in (again, own))
    assert float((ours - theirs).norm() / theirs.norm()) < {"int8": 0.1, "nf4": 0.5}[quant_type]


@pytest.mark.parametrize("form", ["fp8-blocks", "gptq-4", "bitsandbytes-nf4"])
def test_the_head_and_other_tensors_are_dequantised(form: str, tmp_path: Path) -> None:
    """Some packages quantise the head, too; clients read it as numbers."""
    case = next(each for each in CASES if each.id == form)
    model = make_model(LLAMA.config())
    state = in_checkpoint(model, tmp_path / "plain")
    parts, wide = case.pack(state["lm_head.weight"].float())
    stored = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    stored.update({"lm_head" + suffix: part for suffix, part in parts.items()})
    write(tmp_path / "packed", model, case.settings, stored)
    checkpoint = open_checkpoint(tmp_path / "packed")
    read = checkpoint.read(checkpoint.other_tensor_names())
    assert_close(read["lm_head.weight"], wide, rtol=1e-6, atol=1e-6)
    assert set(read) == {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
