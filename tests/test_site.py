"""The documentation: the site builds without a warning, its commands and programs run, its tables tell the truth."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from petals.cli.main import parse, parsers

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PETALS = [sys.executable, "-m", "petals.cli.main"]
ADDR = "/ip4/127.0.0.1/tcp/31337/p2p/12D3KooWHtURmmUjrRwSiMY8FcjtDevyhTTAQAMRfBKuz8ErYeAT"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = "\n".join(blocks(page, "bash")).splitlines()
    return [shlex.split(line.partition(" > ")[0])[1:] for line in lines if line.startswith("petals ")]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, env=ENVIRONMENT | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    built = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in DOCS.glob("*.md")} <= built
    assert "Raises" in (tmp_path / "site" / "api.html").read_text(), "docstrings are in the reference"
    for page in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(r'<(?:script|link rel="stylesheet"|img)[^>]*(?:src|href)="(https?:[^"]+)', page.read_text())
        assert not loaded, f"{page.name} loads {loaded}"


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_every_command_parses(page: str) -> None:
    for command in commands(page):
        if command[0] in parsers()[1]:
            parse(command)


def test_the_quick_start_says_what_is_tested_elsewhere() -> None:
    """Its first commands are those of the README and of the gateway's page, whose tests run them."""
    first, second, _ = commands("quick-start.md")
    assert first in commands("gateway.md")
    readme = [
        shlex.split(line)[1:] for line in (ROOT / "README.md").read_text().splitlines() if line[:12] == "petals peer "
    ]
    told = [[word for word in each if not word.endswith(".key") and word != "--identity"] for each in readme]
    assert second in told


@contextmanager
def running(*words: str, folder: Path, lines: int = 1) -> Iterator[dict[str, Any]]:
    """A peer as a process; yields what it says of itself, in a line for each of its roles."""
    command = [*PETALS, *words, "--json"]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told: dict[str, Any] = {}
        for _ in range(lines):
            line = process.stdout.readline()
            assert line, "it did not start"
            told |= json.loads(line)
        yield told
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The peers of launch-your-own-swarm.md as they stand there, but for the ports; yields ADDR."""
    folder = tmp_path_factory.mktemp("swarm")
    directory, server = commands("launch-your-own-swarm.md")[:2]
    with ExitStack() as stack:
        words = [word.replace("0.0.0.0/tcp/31337", f"127.0.0.1/tcp/{free_port()}") for word in directory]
        addr = stack.enter_context(running(*words, folder=folder))["addrs"][0]
        words = [word.replace("0.0.0.0/tcp/31338", "127.0.0.1/tcp/0").replace("ADDR", addr) for word in server]
        told = stack.enter_context(running(*words, "--throughput", "100", folder=folder))
        assert told["blocks"] == [0, 30], "it holds what fits, which is all of a small model"
        yield addr


def test_a_swarm_of_your_own(launched: str) -> None:
    look = [word.replace("ADDR", launched) for word in commands("launch-your-own-swarm.md")[2]]
    done = subprocess.run([*PETALS, *look], env=ENVIRONMENT, capture_output=True, text=True, timeout=100, check=True)
    assert "degraded, there is only one copy of all blocks" in done.stdout


def test_a_door_for_people(launched: str, tmp_path: Path) -> None:
    keygen, door = commands("launch-your-own-swarm.md")[3:5]
    made = subprocess.run(
        [*PETALS, *keygen], cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True, text=True, timeout=60
    )
    assert "requests_per_minute=60 answers=2 a friend" in (tmp_path / "keys.txt").read_text()
    words = [word.replace("ADDR", launched).replace("0.0.0.0:8000", "127.0.0.1:0") for word in door]
    with running(*words, folder=tmp_path) as told:
        models = urllib.request.Request(told["http"] + "/v1/models")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(models, timeout=30)
        models.add_header("Authorization", f"Bearer {made.stdout.strip().rpartition(' ')[2]}")
        with urllib.request.urlopen(models, timeout=30) as answer:
            assert len(json.load(answer)["data"]) == 1


def test_the_second_peer_of_the_quick_start(launched: str, tmp_path: Path) -> None:
    words = [word.replace("ADDR", launched).replace(":8000", ":0") for word in commands("quick-start.md")[2]]
    with running(*words, folder=tmp_path, lines=2) as told:
        assert told["blocks"] == [15, 30]
        with urllib.request.urlopen(told["http"], timeout=30) as page:
            assert b"<title>" in page.read()


def test_fine_tuning(launched: str, tmp_path: Path) -> None:
    (program,) = blocks("fine-tuning.md", "python")
    done = subprocess.run(
        [sys.executable, "-c", f"ADDR = {launched!r}\n{program}"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loss ")
