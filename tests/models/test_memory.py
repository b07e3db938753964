"""Loading some blocks takes the memory of those blocks, not of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory import measure, write_checkpoint

SLACK_BYTES = 24 << 20
"""For one tensor on its way and what modules allocate for themselves; the blocks left out take 75 MB."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bloom")
    write_checkpoint(directory, hidden=512, blocks=12, vocab=30_000)
    return directory


def test_peak_memory_is_that_of_the_span(directory: Path) -> None:
    half = measure(directory, range(3, 9))
    assert half["weights"] > 70e6
    assert half["peak"] - half["before"] < half["weights"] + SLACK_BYTES
