"""The scripts of the front page: the demonstration, and the one line where a build dependency is missing."""

from __future__ import annotations

import os
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
