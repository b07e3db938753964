"""Loading some blocks takes the memory of those blocks, not of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory import measure, write_checkpoint
from benchmarks.shapes_of_today import Shape, write

SLACK_BYTES = 48 << 20
"""For a matrix on its way in float32 and what modules allocate for themselves; the blocks left out take 176 MB."""

COMPILER_BYTES = 96 << 20
"""What numba's compiler keeps, whatever the size of the matrices (backends.py)."""


@pytest.mark.parametrize(("stored", "least"), [("float32", 70e6), ("float16", 35e6)])
def test_peak_memory_is_that_of_the_span(stored: str, least: float, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hidden=512, blocks=20, vocab=30_000, stored=stored)
    half = measure(tmp_path, range(3, 9))
    assert least < half["weights"] < 1.2 * least, "float16 weights stay as they are, float32 computes with them"
    assert half["peak"] - half["before"] < half["weights"] + SLACK_BYTES


@pytest.mark.parametrize(("form", "experts"), [("fp8", 64), ("mxfp4", 64)])
def test_experts_take_the_bytes_of_their_file(form: str, experts: int, tmp_path: Path) -> None:
    """While they are loaded, too: one of their matrices is dequantised for the self-test, and no other."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    settings = {"num_local_experts": experts, "intermediate_size": 1024, "num_experts_per_tok": 2}
    if form == "fp8":
        settings = {"num_experts": experts, "moe_intermediate_size": 1024, "num_experts_per_tok": 2}
    shape = Shape("small", form, "gpt_oss" if form == "mxfp4" else "qwen3_moe", {**sizes, **settings}, 2 / experts)
    total, _ = write(shape, tmp_path / "model")
    load = measure(tmp_path / "model", range(1))
    matrix = 4 * 2 * 1024 * 1024
    assert total < load["weights"] < 1.05 * total
    assert load["held"] < 1.05 * total + COMPILER_BYTES
    assert load["peak"] - load["before"] < 1.05 * total + 2 * matrix + COMPILER_BYTES + SLACK_BYTES
