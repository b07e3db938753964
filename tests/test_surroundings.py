"""No test sees the user's home or changes anything there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from petals.models.source.disk import cache_directory
from petals.models.source.hub import DEFAULT_GGUF_SHA256
from tests.conftest import reason_of, shuffle, skipped_line
from tests.surroundings import CACHE, DEFAULT_MODEL, ROOT

PROBE = """
import json, os, sys
from pathlib import Path
from tests.surroundings import move_in, move_out
home = move_in()
assert move_in() is None
from petals.models.source.disk import cache_directory
model = [str(path) for path in cache_directory().glob("converted/*/*")]
said = {name: value for name, value in os.environ.items()}
print(json.dumps([str(Path.home()), str(cache_directory()), said, model]))
sys.stdout.flush()
sys.stdin.read()
move_out(home)
"""


def visit(**environment: str) -> tuple[subprocess.Popen[str], list[object]]:
    """A run of tests with this environment, until it is told to end; what it sees."""
    clean = {name: value for name, value in os.environ.items() if name != "TESTS_HOME"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROBE], cwd=ROOT, env=clean | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def test_tests_live_in_a_home_of_their_own(tmp_path: Path) -> None:
    (tmp_path / ".config" / "pip").mkdir(parents=True)
    (tmp_path / ".config" / "pip" / "pip.conf").write_text("[global]\n")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    process, (home, cache, environment, _) = visit(
        HOME=str(tmp_path), PETALS_CACHE=str(tmp_path / "c"), PETALS_SEED="7", HF_HOME="/h", PIP_INDEX_URL="http://here"
    )
    assert isinstance(environment, dict)
    assert str(home).startswith(str(ROOT / "build" / "home-"))
    assert Path(str(cache)).is_relative_to(str(home))
    assert not {"PETALS_SEED", "PETALS_CACHE", "HF_HOME"} & set(environment)
    assert environment["PIP_INDEX_URL"] == "http://here", "the machine's packages are found"
    assert environment["PIP_CONFIG_FILE"] == os.environ.get("PIP_CONFIG_FILE", str(tmp_path / ".config/pip/pip.conf"))
    process.communicate("", timeout=60)
    assert not Path(str(home)).exists()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_home_of_a_run_that_was_killed_is_swept_up() -> None:
    first, (left, *_) = visit()
    first.kill()
    first.communicate(timeout=60)
    assert Path(str(left)).is_dir()
    second, _ = visit()
    second.communicate("", timeout=60)
    assert not Path(str(left)).exists()


def test_the_default_model_is_a_copy_of_the_users(tmp_path: Path) -> None:
    assert DEFAULT_MODEL.startswith(f"converted/{DEFAULT_GGUF_SHA256[:32]}")
    own = [path for path in CACHE.glob(f"petals/{DEFAULT_MODEL}/*") if path.is_file()]
    assert own, "python -m tests.surroundings brings it"
    for path in own:
        here = cache_directory() / path.relative_to(CACHE / "petals")
        assert here.samefile(path), "no copy for every run"


def test_this_run_is_in_one(tmp_path: Path) -> None:
    assert Path.home() == Path(os.environ["TESTS_HOME"])
    assert Path.home().is_relative_to(ROOT / "build")
    assert time.time() - Path.home().stat().st_mtime < 86400


def test_what_is_skipped_is_counted_and_named() -> None:
    assert skipped_line(Counter()) == ""
    reasons = Counter({"no network: npm brings nothing": 3, "no systemd": 1})
    assert skipped_line(reasons) == (
        "skipped: 4 tests, 3 of them for want of a network: 3 x no network: npm brings nothing; 1 x no systemd"
    )


def test_why_an_asynchronous_test_was_skipped() -> None:
    def forget() -> None:
        try:
            raise BaseExceptionGroup("of a nursery", [pytest.skip.Exception("no network")])
        except BaseExceptionGroup:
            pytest.skip()

    with pytest.raises(pytest.skip.Exception) as caught:
        forget()
    assert reason_of(caught.value) == "no network"
    assert reason_of(ValueError()) == ""


def test_an_order_is_random_by_files_and_the_same_for_a_seed(request: pytest.FixtureRequest) -> None:
    items = list(request.session.items)
    orders = []
    for seed in ("1", "1", "2"):
        shuffled = items[::-1] if len(orders) == 1 else items[:]
        shuffle(shuffled, seed)
        assert sorted(map(id, shuffled)) == sorted(map(id, items))
        files = [item.path for item in shuffled]
        blocks = [path for index, path in enumerate(files) if index == 0 or path != files[index - 1]]
        assert len(blocks) == len(set(blocks)), "a file's tests stay together"
        orders.append([item.nodeid for item in shuffled])
    assert orders[0] == orders[1]
    assert len(items) < 5 or orders[0] != orders[2]
