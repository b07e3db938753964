"""Every example runs with a few steps, and its notebook is its script."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.surroundings import NO_NETWORK
from tests.test_readme import commands, serving

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.fixture(scope="module")
def addrs() -> Iterator[str]:
    """The two servers of the README."""
    with serving(*commands()[:2]) as (first, _):
        yield " ".join(first["addrs"])


def test_notebooks_are_their_scripts() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from notebooks import notebook
    finally:
        sys.path.pop(0)
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"common"}
    assert {path.stem for path in NOTEBOOKS} == scripts
    for path in NOTEBOOKS:
        script = path.with_suffix(".py").read_text()
        assert path.read_text() == notebook(script), f"run scripts/notebooks.py: {path.name} is not its script"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, addrs: str, tmp_path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    settings = {"PYTHONPATH": str(ROOT), "STEPS": "2", "RESULTS": str(tmp_path), "PETALS_INITIAL_PEERS": addrs}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=path.parent,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    if "report(" not in program:
        assert "loss" in result.stdout
        return
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 5000
    scores = json.loads((tmp_path / f"{path.stem}.json").read_text())["scores"]
    assert len(scores) >= 2
    assert all(0 <= score < 20 for score in scores.values())


def test_a_download_that_is_broken_is_fetched_again(tmp_path: Path) -> None:
    """And what the package index has otherwise is refused."""
    probe = (
        "import sys; from pathlib import Path\n"
        "from common import DIALOGUES, _package, dialogues\n"
        "path = _package(*DIALOGUES)\n"
        "path.write_bytes(path.read_bytes()[:1000])\n"
        "assert dialogues('greetings')\n"
        "left = [each.name for each in path.parent.iterdir()]\n"
        "assert left == [path.name], left\n"
        "path.unlink()\n"
        "_package(*DIALOGUES[:2], 64 * '0')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT / "examples", env=os.environ | {"PETALS_CACHE": str(tmp_path)},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    if re.search("NameResolution|NewConnection|ConnectTimeout", done.stderr):
        pytest.skip(f"{NO_NETWORK}: pip fetches no dialogues")
    assert done.returncode == 1
    assert "than this example was written for" in done.stderr.splitlines()[-1]
