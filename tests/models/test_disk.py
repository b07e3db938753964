"""Folders of the cache: whole or not there, whoever is killed or comes at the same time."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from petals.models.source.disk import make_whole

FILES = ("one", "two")
MAKER = """
import sys, time
from pathlib import Path
from petals.models.source.disk import make_whole

def make(room):
    (room / "one").write_text("one")
    print("half", flush=True)
    sys.stdin.read()
    (room / "two").write_text("two")

make_whole(Path(sys.argv[1]), lambda goal: (goal / "two").exists(), make)
"""


def is_whole(goal: Path) -> bool:
    return all((goal / name).is_file() and (goal / name).read_text() == name for name in FILES)


def make(room: Path) -> None:
    for name in FILES:
        (room / name).write_text(name)


def other_process(goal: Path) -> subprocess.Popen[str]:
    """Half done."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKER, str(goal)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


def test_of_many_at_once_one_makes_it(tmp_path: Path) -> None:
    goal, made = tmp_path / "above" / "goal", []

    def once(room: Path) -> None:
        made.append(room)
        make(room)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: make_whole(goal, is_whole, once), range(8)))
    assert len(made) == 1
    assert is_whole(goal)


def test_another_process_is_waited_for(tmp_path: Path) -> None:
    goal, waiting = tmp_path / "goal", threading.Event()
    process = other_process(goal)
    with ThreadPoolExecutor() as pool:
        done = pool.submit(make_whole, goal, is_whole, lambda room: pytest.fail("made twice"), waiting.set)
        assert waiting.wait(60)
        assert not goal.exists()
        process.communicate("", timeout=60)
        done.result(60)
    assert is_whole(goal)


def test_what_a_killed_process_left_is_swept_up_and_made_anew(tmp_path: Path) -> None:
    goal = tmp_path / "goal"
    process = other_process(goal)
    process.kill()
    process.communicate(timeout=60)
    assert not goal.exists()
    assert list(tmp_path.glob("goal.*.part"))
    make_whole(goal, is_whole, make)
    assert is_whole(goal)
    assert {path.name for path in tmp_path.iterdir()} == {"goal", "goal.lock"}


def test_what_is_broken_stays_until_there_is_better(tmp_path: Path) -> None:
    goal = tmp_path / "goal[1]"
    goal.mkdir()
    (goal / "one").write_text("broken")

    def fail(room: Path) -> None:
        make(room)
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        make_whole(goal, is_whole, fail)
    assert {path.name for path in tmp_path.iterdir()} == {goal.name, f"{goal.name}.lock"}
    make_whole(goal, is_whole, make)
    assert is_whole(goal)
    with pytest.raises(OSError, match="not whole though"):
        make_whole(tmp_path / "never", is_whole, lambda room: None)
