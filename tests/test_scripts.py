"""The scripts of the front page: the demonstration, and the one line where a build dependency is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

ROOT = Path(__file__).parents[1]


def test_the_demonstration_writes_text_and_leaves_nothing_behind() -> None:
    sign = uuid4().hex  # in the environment of the demonstration and of all that it starts
    result = subprocess.run(
        [sys.executable, "scripts/demo.py", "The", "sky", "is"], env=os.environ | {"PETALS_TEST": sign},
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The sky is")
    assert "petals: route 0:15 via …" in result.stderr
    assert "Traceback" not in result.stderr
    processes = list(psutil.process_iter(["environ"]))
    assert any((process.info["environ"] or {}).get("PATH") for process in processes)  # environments can be read here
    assert not [process for process in processes if (process.info["environ"] or {}).get("PETALS_TEST") == sign]


@pytest.mark.parametrize(("compiler", "advice"), [("no-such-compiler", "C compiler"), ("false", "libgmp-dev")])
def test_a_missing_build_dependency_gets_one_line(tmp_path: Path, compiler: str, advice: str) -> None:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    result = subprocess.run(
        ["bash", str(tmp_path / "scripts/setup")],
        env=os.environ | {"CC": compiler, "PYTHON": sys.executable},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert advice in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_what_benchmarks_print_gets_into_the_page_and_is_drawn(tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "docs" / "performance.md"
    results.mkdir()
    (page.parent / "images").mkdir(parents=True)
    page.write_text("# Speed\n<!-- bench: decode -->\nold\n<!-- end -->\n<!-- bench: memory -->\nkept\n<!-- end -->\n")
    table = (
        "| decode | tokens/s, median (min - max) |\n|---|---|\n| plain | 1,025.5 (7 - 8) |\n| ours | 2050 (1 - 2) |\n"
    )
    (results / "decode.md").write_text("`python benchmarks/decode.py`\n\n" + table)
    command = [sys.executable, "scripts/figures.py", "--results", str(results), "--page", str(page)]
    drawn = []
    for _ in range(2):  # the second time changes nothing
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
        assert "old" not in page.read_text()
        assert page.read_text().count(table) == 1
        assert "\nkept\n" in page.read_text()
        drawn.append((page.read_text(), (page.parent / "images" / "bench-decode.svg").read_text()))
    assert drawn[0] == drawn[1]
    assert drawn[0][1].startswith("<?xml")
    assert [file.name for file in (page.parent / "images").iterdir()] == ["bench-decode.svg"]


def test_the_page_has_places_for_known_benchmarks_only() -> None:
    places = re.findall(r"<!-- bench: ([\w-]+) -->", (ROOT / "docs" / "performance.md").read_text())
    runs = (ROOT / "scripts" / "bench").read_text()
    known = re.search(r"^all=\((.*?)\)", runs, re.MULTILINE | re.DOTALL)
    assert known
    assert places
    assert set(places) <= set(known[1].split())
