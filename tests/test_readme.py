"""The README's programs and commands run as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
README = (ROOT / "README.md").read_text().replace("/tcp/31337", f"/tcp/{31337 + WORKER}")
"""Each of the workers that run tests side by side takes a port of its own."""
CLIENT = (ROOT / "docs" / "client.md").read_text()
ADDR = re.search(r'ADDR = "(.*)"', README)[1]  # type: ignore[index]
PETALS = [sys.executable, "-m", "petals.cli.main"]


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for line in blocks("bash")[0].splitlines() if line and not line.startswith("#")]
    assert all(line.startswith("petals ") for line in lines)
    return [[*PETALS, *shlex.split(line)[1:]] for line in lines]


@contextmanager
def serving(*servers: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Servers as processes; yields what each says of itself once it serves."""
    with ExitStack() as stack:
        said = []
        for command in servers:
            process = subprocess.Popen([*command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            stack.callback(_end, process)
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, "the server did not start"
            said.append(json.loads(line))
        yield said


def _end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def swarm() -> Iterator[str]:
    """The two servers of the README; yields what the third command prints."""
    first, second, ask = commands()
    with serving(first, second):
        yield subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_commands_write_text(swarm: str) -> None:
    assert swarm.startswith("A cat sat on")
    assert len(swarm) > 60


@pytest.mark.parametrize("program", blocks("python"), ids=["trio", "synchronous"])
def test_the_programs_run(swarm: str, program: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(swarm[len("A cat sat on") :][:20])


@pytest.mark.parametrize("program", blocks("python", CLIENT)[1:], ids=["sessions", "lora", "trio"])
def test_the_programs_of_the_client_page_run(swarm: str, program: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"ADDR = {ADDR!r}\n{program}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), ROOT / "protocols/SPEC.md"]
    for page in pages:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"
