"""What people see while something takes long: in a terminal, in a pipe, and of loading itself."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import pytest

from petals.cli.base.terminal import hush, say
from petals.models import progress
from petals.models.kernels.float16_weights import can_halve
from petals.models.progress import Meter, Passing, counting_seconds
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.hub import bars_on_terminals_only
from petals.models.source.loading import load_span
from tests.models.tiny import CASES, save_tiny


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_overwrites_what_a_pipe_lists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["loading", Passing("10%"), Passing("20%"), "done"]
    for line in lines:
        say(line)
    hush()
    assert capsys.readouterr().err == "petals: loading\npetals: 10%\npetals: 20%\npetals: done\n"
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    for line in lines:
        say(line)
    clear = "\r\x1b[2K"
    assert screen.getvalue() == f"petals: loading\npetals: 10%{clear}petals: 20%{clear}petals: done\n"
    say(Passing("30%"))
    hush()
    hush()
    assert screen.getvalue().endswith(f"petals: 30%{clear}")


def test_quick_work_says_nothing_and_slow_work_now_and_then() -> None:
    now, said = 0.0, list[str]()
    meter = Meter(said.append, "reading", 100, "tensors", lambda: now)
    meter.note(10)
    now = 1.9
    meter.note(50)
    assert said == []
    now = 2.5
    meter.note(60)
    now = 4.0
    meter.note(70)
    now = 60.0
    meter.note(99)
    meter.note(100)
    assert said == ["reading: 60% of 100 tensors, 2 s", "reading: 99% of 100 tensors, 60 s"]
    assert isinstance(said[0], Passing)


def test_work_that_says_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    said, told = list[str](), threading.Event()

    def tell(line: str) -> None:
        said.append(line)
        told.set()

    before = threading.active_count()
    with counting_seconds(tell, "converting"):
        assert told.wait(10)
    assert threading.active_count() == before
    assert said[0] == "converting: 0 s"
    with counting_seconds(None, "nobody listens"):
        assert threading.active_count() == before


def test_loading_and_quantising_say_how_far_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    save_tiny(next(case for case in CASES if case.id == "llama"), tmp_path)
    checkpoint, said = open_checkpoint(tmp_path), list[str]()
    if can_halve():
        load_span(checkpoint, range(1, 3), progress=said.append)
        assert said == ["reading blocks 1:3: 50% of 2 blocks, 0 s"]
        said.clear()
    monkeypatch.setattr("petals.models.blocks.assemble.can_halve", lambda: False)
    load_span(checkpoint, range(1, 3), progress=said.append)
    assert said == ["reading blocks 1:3: 50% of 2 blocks, 0 s"]
    said.clear()
    load_span(checkpoint, range(1, 3), quant_type="int8", progress=said.append)
    assert said == ["quantising to int8: 50% of 2 blocks, 0 s"]


def test_the_hubs_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bars_on_terminals_only():
        assert are_progress_bars_disabled()
    monkeypatch.setattr(sys, "stderr", Screen())
    with bars_on_terminals_only():
        assert not are_progress_bars_disabled()
