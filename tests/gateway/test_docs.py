"""docs/gateway.md runs as it stands there, but for the port; and the command's mistakes are one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gateway.md").read_text()
PETALS = [sys.executable, "-m", "petals.cli.main"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def start(words: list[str], folder: Path) -> tuple[subprocess.Popen[str], str]:
    """A door as a process, on a free port, and its URL."""
    words = [re.sub(":8000$", ":0", word) for word in words]
    process = subprocess.Popen(
        [*PETALS, *words, "--json"], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()  # the server
    return process, json.loads(process.stdout.readline())["http"]


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, url = start(shlex.split(blocks("bash")[0])[1:], tmp_path_factory.mktemp("door"))
    yield url
    end(process)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_command(door: str) -> None:
    command = shlex.split(blocks("bash")[1].replace("http://127.0.0.1:8000", door))
    answer = json.loads(subprocess.run([*command, "-s"], check=True, capture_output=True, timeout=60).stdout)
    assert answer["usage"]["completion_tokens"] == 12


def test_the_program(door: str) -> None:
    program = blocks("python")[0].replace("http://127.0.0.1:8000", door)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    assert len(done.stdout) > 10


def test_every_metric_is_documented(door: str) -> None:
    with urllib.request.urlopen(f"{door}/metrics", timeout=30) as response:
        names = set(re.findall(r"^# TYPE (\S+)", response.read().decode(), flags=re.MULTILINE))
    assert len(names) > 8
    assert not [name for name in names if name not in PAGE]


def test_the_command_for_terminals(door: str) -> None:
    command = shlex.split(blocks("bash")[3].replace("http://127.0.0.1:8000", door))[1:]
    seen = subprocess.run(
        [*PETALS, *command], check=True, capture_output=True, text=True, timeout=60, cwd=ROOT, env=ENVIRONMENT
    )
    assert "blocks 0:30, copies of each" in seen.stdout
    assert "throughput of this peer" in seen.stdout


def test_the_commands_for_friends(tmp_path: Path) -> None:
    keygen, serve = [shlex.split(line)[1:] for line in blocks("bash")[2].splitlines()]
    made = subprocess.run([*PETALS, *keygen], cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    process, url = start(serve, tmp_path)
    request = urllib.request.Request(f"{url.replace('0.0.0.0', '127.0.0.1')}/v1/models")
    request.add_header("authorization", f"Bearer {made.stdout.strip()}")
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200
    end(process)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--serve", "0:30", "--http", "8000"], "HOST:PORT"),
        (["--serve", "0:30", "--api_keys", "keys.txt"], "--http"),
        (["--http"], "nobody to ask"),
        (["--serve", "0:30", "--http", "--generate", "x"], "give one of them"),
        (["--bootstrap", "--http"], "only keeps the directory"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], complaint: str) -> None:
    done = subprocess.run([*PETALS, "peer", *words], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_door_says_which_blocks_nobody_holds() -> None:
    command = [*PETALS, "peer", "--serve", "0:10", "--new_swarm", "--http", "127.0.0.1:0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert process.stderr is not None
    said = next(line for line in process.stderr if "nobody" in line)
    end(process)
    assert said.startswith("petals: nobody holds blocks 10:30 yet: answers wait until")


def test_a_door_that_can_not_be_is_known_before_a_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        in_use = f"127.0.0.1:{taken.getsockname()[1]}"
        for words, complaint in (
            (["--http", in_use], f"can not listen on {in_use}: Address already in use; another program has that port"),
            (["--http", "127.0.0.1:0", "--api_keys", str(tmp_path / "none")], f"can not read {tmp_path / 'none'}"),
        ):
            command = [*PETALS, "peer", "--serve", "0:30", *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
            assert done.returncode == 2
            assert complaint in done.stderr.splitlines()[-1]
            assert "loading" not in done.stderr
