"""Loading some blocks takes the memory of those blocks, not of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory import measure, write_checkpoint

SLACK_BYTES = 48 << 20
"""For a matrix on its way in float32 and what modules allocate for themselves; the blocks left out take 176 MB."""


@pytest.mark.parametrize(("stored", "least"), [("float32", 70e6), ("float16", 35e6)])
def test_peak_memory_is_that_of_the_span(stored: str, least: float, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, hidden=512, blocks=20, vocab=30_000, stored=stored)
    half = measure(tmp_path, range(3, 9))
    assert least < half["weights"] < 1.2 * least, "float16 weights stay as they are, float32 computes with them"
    assert half["peak"] - half["before"] < half["weights"] + SLACK_BYTES
