"""Every decoder with what is committed, and with a few mutations of it. The longer runs: docs/security-testing.md."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import run
from tests.fuzz.harnesses import HARNESSES, corpus_of
from tests.fuzz.mutate import mutate


@pytest.mark.parametrize("name", HARNESSES)
def test_what_is_committed(name: str) -> None:
    """Valid inputs, and all that ever found a bug."""
    inputs = corpus_of(name)
    assert len(inputs) >= len(HARNESSES[name].seeds())
    for data in inputs:
        HARNESSES[name].one_input(data)


@pytest.mark.parametrize("name", HARNESSES)
def test_mutations_of_it(name: str) -> None:
    harness, pool = HARNESSES[name], corpus_of(name)
    changed = st.builds(
        lambda data, seed: mutate(data, pool, Random(seed), harness.grammar),
        st.sampled_from(pool),
        st.integers(0, 1 << 32),
    )

    @settings(max_examples=harness.ci_inputs, database=None, suppress_health_check=list(HealthCheck))
    @given(changed | st.binary(max_size=300))
    def fuzz(data: bytes) -> None:
        harness.one_input(data)

    fuzz()


def test_the_longer_run_finds_what_there_is_to_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tool itself: a decoder that is broken on purpose is reported, once, with its input; a whole one is not. That
    it takes too much is seen by what the process held, so for an input that is not traced, and for C's memory, too."""
    monkeypatch.setattr(run, "FOUND", tmp_path)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    options = Namespace(seed=0, inputs=60, seconds=60.0, limit=0.0)

    def broken(data: bytes) -> None:
        if len(data) % 7 == 0:
            raise ZeroDivisionError

    assert run.fuzz("frames", HARNESSES["frames"], options) == 0
    assert run.fuzz("frames", replace(HARNESSES["frames"], one_input=broken), options) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    (found,) = (tmp_path / "frames").iterdir()
    assert len(found.read_bytes()) % 7 == 0

    def greedy(data: bytes) -> None:
        torch.ones(run.PEAK_BYTES + (1 << 20) if len(data) % 7 == 0 else 1, dtype=torch.uint8)

    assert run.fuzz("noise", replace(HARNESSES["noise"], one_input=greedy), options) == 1
    assert "TooMuch" in capsys.readouterr().err
