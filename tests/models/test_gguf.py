"""GGUF files that are served as they are, against `transformers`, which dequantises them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from petals.models.errors import CheckpointError
from petals.models.kernels.ggml import GGML_TYPES, dequantise_rows
from petals.models.source import hub
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.gguf_file import GgufCheckpoint
from petals.models.source.loading import load_span
from petals.models.source.weights import SharedWeights
from tests.models.test_formats import check_against, file_bytes
from tests.models.test_weights import assemble
from tests.models.tiny import Reference

HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where in a block the float16 are."""
SHAPES = {
    "attn_q": (256, 256),
    "attn_k": (128, 256),
    "attn_v": (128, 256),
    "attn_output": (256, 256),
    "ffn_gate": (512, 256),
    "ffn_up": (512, 256),
    "ffn_down": (256, 512),
}
EXPERTS = {"ffn_gate_exps": (4, 768, 256), "ffn_up_exps": (4, 768, 256), "ffn_down_exps": (4, 256, 768)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALS_CACHE", str(tmp_path / "cache"))


def blocks(kind: str, shape: tuple[int, ...], rng: Any) -> Any:
    """Random blocks of a type whose values have about the size that weights have. The gguf package writes only some."""
    if kind in ("Q4_0", "Q4_1", "Q8_0"):
        return quantize(rng.standard_normal(shape, dtype=np.float32) * 3 / shape[-1] ** 0.5, GGMLQuantizationType[kind])
    weights, nbytes = GGML_TYPES[kind]
    rows = int(np.prod(shape[:-1]))
    raw = rng.integers(0, 256, (rows * shape[-1] // weights, nbytes)).astype(np.uint8)
    for at in HALVES[kind]:
        raw[:, at : at + 2] = rng.uniform(0.5, 1, (len(raw), 1)).astype(np.float16).view(np.uint8)
    values = dequantise_rows(torch.from_numpy(raw.copy()), kind)
    shrink = 3 / shape[-1] ** 0.5 / float(values.std())
    for at in HALVES[kind]:
        small = raw[:, at : at + 2].copy().view(np.float16).astype(np.float32) * shrink
        raw[:, at : at + 2] = small.astype(np.float16).view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def write(
    path: Path,
    kind: str,
    arch: str = "llama",
    *,
    lacking: str = "",
    rope: Any = None,
    split: int = 0,
    scaling: str = "",
) -> None:
    """A model of two blocks whose matrices are of a type."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if scaling:
        writer.add_string(f"{arch}.rope.scaling.type", scaling)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "d", "e", "f", "g", "<|end|>"])
    writer.add_token_types([1] * 7 + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(7)
    writer.add_eos_token_id(7)
    shapes: dict[str, tuple[int, ...]] = dict(SHAPES)
    if arch == "qwen3moe":
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(EXPERTS["ffn_up_exps"][1])
        shapes = {name: shape for name, shape in SHAPES.items() if name.startswith("attn")} | EXPERTS
    if arch in ("qwen3", "qwen3moe"):  # whose heads are 128 wide, whatever the file says (transformers 5.23)
        writer.add_key_length(128)
        writer.add_value_length(128)
        shapes |= {"attn_q": (512, 256), "attn_k": (256, 256), "attn_v": (256, 256), "attn_output": (256, 512)}
    plain: dict[str, tuple[int, ...]] = {"output_norm": (256,)}
    matrices = {"token_embd": (8, 256), "output": (8, 256)}
    for block in range(2):
        matrices |= {f"blk.{block}.{name}": shape for name, shape in shapes.items()}
        plain |= {f"blk.{block}.{name}": (256,) for name in ("attn_norm", "ffn_norm")}
        if arch in ("qwen3", "qwen3moe"):
            plain |= {f"blk.{block}.{name}": (128,) for name in ("attn_q_norm", "attn_k_norm")}
        if arch == "qwen3moe":
            plain[f"blk.{block}.ffn_gate_inp"] = (4, 256)
    for name, shape in plain.items():
        if name != lacking:
            spread = 1.0 if len(shape) == 1 else 0.0
            writer.add_tensor(f"{name}.weight", (spread + 0.2 * rng.standard_normal(shape)).astype(np.float32))
    if arch == "qwen2":
        for block in range(2):
            for name in ("attn_q", "attn_k", "attn_v"):
                bias = 0.2 * rng.standard_normal(SHAPES[name][0])
                writer.add_tensor(f"blk.{block}.{name}.bias", bias.astype(np.float32))
    for name, shape in matrices.items():
        if name != lacking:
            raw = blocks(kind, shape, rng)
            writer.add_tensor(f"{name}.weight", raw, raw_dtype=GGMLQuantizationType[kind])
    if rope is not None:
        writer.add_tensor("rope_freqs.weight", rope)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quietly(line: str) -> None:
    """Nobody listens."""


@pytest.mark.parametrize("kind", GGML_TYPES)
def test_the_reference_is_the_gguf_packages(kind: str) -> None:
    raw = blocks(kind, (6, 512), np.random.default_rng(1))
    theirs = dequantize(raw, GGMLQuantizationType[kind])
    assert torch.equal(dequantise_rows(torch.from_numpy(raw), kind), torch.from_numpy(theirs))


@pytest.mark.parametrize(
    ("kind", "arch"),
    [*((kind, "llama") for kind in GGML_TYPES), ("Q4_K", "qwen2"), ("Q6_K", "qwen3"), ("Q4_K", "qwen3moe")],
)
def test_a_file_is_served_as_it_is(kind: str, arch: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, kind, arch)
    truth = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    said: list[str] = []
    checkpoint = open_checkpoint(path, progress=said.append)
    assert isinstance(checkpoint, GgufCheckpoint)
    assert [line.split()[0] for line in said] == ["reading"]
    span = check_against(Reference(truth.eval()), checkpoint, vocabulary=8)
    assert span.weight_bytes <= 1.15 * file_bytes(checkpoint)
    others = checkpoint.read(checkpoint.other_tensor_names())
    assert_close(others["lm_head.weight"], truth.lm_head.weight.detach())
    assert_close(others["model.embed_tokens.weight"], truth.model.embed_tokens.weight.detach())
    assert checkpoint.tokenizer()("ab")["input_ids"]
    small = sum(file.stat().st_size for file in checkpoint.directory.iterdir())
    assert small < 20_000, "no weight is copied"


def test_a_split_file(tmp_path: Path) -> None:
    write(tmp_path / "whole.gguf", "Q4_K")
    write(tmp_path / "model.gguf", "Q4_K", split=6)
    parts = sorted(tmp_path.glob("model-*-of-*.gguf"))
    assert len(parts) > 2
    whole = load_span(open_checkpoint(tmp_path / "whole.gguf", progress=quietly), range(2))
    split = load_span(open_checkpoint(parts[1], progress=quietly), range(2))
    hidden = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(split.forward(hidden, range(2)), whole.forward(hidden, range(2)))
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=rf"one of {len(parts)} parts, and 1 are not beside it: model-00002-of"):
        open_checkpoint(parts[0], progress=quietly)


@pytest.mark.parametrize("lacking", ["blk.1.ffn_up", "blk.1.attn_norm"])
def test_a_file_that_lacks_a_blocks_tensor(lacking: str, tmp_path: Path) -> None:
    write(tmp_path / "holed.gguf", "Q4_K", lacking=lacking)
    with pytest.raises(CheckpointError, match="holed lacks block tensors: layers"):
        load_span(open_checkpoint(tmp_path / "holed.gguf", progress=quietly), range(2))


@pytest.mark.parametrize("lacking", ["output_norm", "token_embd"])
def test_a_file_that_lacks_another_tensor(lacking: str, tmp_path: Path) -> None:
    write(tmp_path / "holed.gguf", "Q4_K", lacking=lacking)
    with pytest.raises(CheckpointError, match=r"holed\.gguf lacks model\."):
        load_span(open_checkpoint(tmp_path / "holed.gguf", progress=quietly), range(2))


def test_experts_of_another_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.23 takes every Qwen3-MoE's experts to be 768 wide; those of the 235B model are 1,536."""
    for name, shape in {
        "ffn_gate_exps": (4, 256, 256),
        "ffn_up_exps": (4, 256, 256),
        "ffn_down_exps": (4, 256, 256),
    }.items():
        monkeypatch.setitem(EXPERTS, name, shape)
    write(tmp_path / "model.gguf", "Q4_K", "qwen3moe")
    checkpoint = open_checkpoint(tmp_path / "model.gguf", progress=quietly)
    assert checkpoint.config.moe_intermediate_size == 256
    assert load_span(checkpoint, range(2)).weight_bytes <= 1.15 * file_bytes(checkpoint)


def test_a_rotary_embedding_that_is_scaled(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "Q4_K", scaling="yarn")
    with pytest.raises(CheckpointError, match=r"rotary embedding is scaled \(yarn\)"):
        open_checkpoint(tmp_path / "model.gguf", progress=quietly)


def test_llama_3s_rotary_embedding(tmp_path: Path) -> None:
    """transformers 5.23 does not look at `rope_freqs`: the truth is its embedding with the entry that Llama 3.1 has."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 10000.0}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=scaling)
    wanted = LlamaRotaryEmbedding(config).inv_freq
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    write(tmp_path / "model.gguf", "Q4_K", rope=(plain / wanted).numpy().astype(np.float32))
    span = load_span(open_checkpoint(tmp_path / "model.gguf", progress=quietly), range(2))
    assert_close(span._model.rotary_emb.inv_freq, wanted)  # type: ignore[union-attr]
    write(tmp_path / "other.gguf", "Q4_K", rope=np.linspace(1, 3, 32).astype(np.float32))
    with pytest.raises(CheckpointError, match=r"rope_freqs\) in a way that is not known"):
        open_checkpoint(tmp_path / "other.gguf", progress=quietly)


def test_it_can_be_passed_on_to_another_peer(tmp_path: Path) -> None:
    """Who fetches it has safetensors of the file's own blocks."""
    write(tmp_path / "model.gguf", "Q4_K", "qwen3moe")
    checkpoint = open_checkpoint(tmp_path / "model.gguf", progress=quietly)
    fetched = assemble(SharedWeights(checkpoint), tmp_path / "fetched")
    assert not isinstance(fetched, GgufCheckpoint)
    assert fetched.digest == checkpoint.digest
    hidden = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(0))
    ours, theirs = (load_span(each, range(2)) for each in (fetched, checkpoint))
    assert torch.equal(ours.forward(hidden, range(2)), theirs.forward(hidden, range(2)))
    assert ours.weight_bytes == theirs.weight_bytes


def test_the_same_content_is_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one.gguf", "Q4_0")
    shutil.copy(tmp_path / "one.gguf", tmp_path / "two.gguf")
    digests = {open_checkpoint(tmp_path / f"{name}.gguf", progress=quietly).digest for name in ("one", "two")}
    assert len(digests) == 1
    monkeypatch.setattr(hub, "_sha256", None)  # known by its size and time
    assert {open_checkpoint(tmp_path / "one.gguf", progress=quietly).digest} == digests
