"""The Dockerfile and the systemd unit: linted, true to the command line, and their steps run without an engine."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
import trio

from petals.cli.healthcheck import answers, port_of
from petals.cli.main import parse, parsers
from petals.cli.settings import flags_of
from petals.peer.base.identity import create_identity
from petals.peer.net.host import HostConfig, open_host
from petals.peer.net.wire.pnet import SwarmKey

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
UNIT = (ROOT / "packaging" / "petals.service").read_text()
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()
NO_FLAGS = {"PETALS_CACHE", "PETALS_FLAG"}


def instruction(name: str) -> str:
    """The last one of its kind, on one line."""
    lines = DOCKERFILE.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()[1:]) for line in lines if line.split()[:1] == [name]][-1]


def variables() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in instruction("ENV").split())


def test_the_dockerfile_has_no_lint() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_it_runs_as_nobody_special() -> None:
    assert int(instruction("USER")) >= 1000
    assert "DynamicUser=yes" in UNIT


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "petals.service"
    unit.write_text(UNIT.replace("/opt/petals/bin/petals", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("text", [DOCKERFILE, UNIT, DEPLOY], ids=["Dockerfile", "unit", "page"])
def test_every_flag_and_variable_is_real(text: str) -> None:
    _, verbs = parsers()
    names = {name for flag in flags_of(verbs["peer"]) for name in flag.names}
    told = set(re.findall(r"\bPETALS_[A-Z_]+", text)) - NO_FLAGS
    assert told
    assert {each.removeprefix("PETALS_").lower() for each in told} <= names


def test_the_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    entry, flags = json.loads(instruction("ENTRYPOINT")), json.loads(instruction("CMD"))
    for name, value in variables().items():
        monkeypatch.setenv(name, value)
    options = parse([*entry[1:], *flags])
    assert options.serve == range(0)
    assert options.listen == ["/ip4/0.0.0.0/tcp/31337"]
    assert str(port_of(options.listen[0])) in instruction("EXPOSE").split()
    service = re.search(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)
    assert service is not None
    assert parse(service[1].split()[1:]).serve == range(0)


def context(folder: Path) -> None:
    """What the engine would be sent: .dockerignore's patterns, the last that fits decides."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in tracked.stdout.splitlines():
        kept = True
        for rule in rules:
            pattern = rule.removeprefix("!")
            if pattern.startswith("**/"):
                fits = any(fnmatch.fnmatch(part, pattern[3:]) for part in name.split("/"))
            else:
                fits = fnmatch.fnmatch(name.split("/")[0], pattern)
            kept = rule.startswith("!") if fits else kept
        if kept:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target, follow_symlinks=False)


def test_what_is_sent_installs_starts_and_is_healthy(tmp_path: Path) -> None:
    """The build's own steps but for apt and the downloads of what we depend on, which stand in the path instead."""
    sent, installed = tmp_path / "src", tmp_path / "petals"
    sent.mkdir()
    context(sent)
    assert not list(sent.rglob("*.key"))
    assert not (sent / "tests").exists()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), "."]
    subprocess.run(pip, cwd=sent, check=True, capture_output=True, timeout=200)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {name: value for name, value in variables().items() if name != "PATH"}
    environment = os.environ | {name: value.replace("/data", str(tmp_path)) for name, value in told.items()}
    environment |= {"PYTHONPATH": str(installed), "PETALS_LISTEN": f"/ip4/127.0.0.1/tcp/{port}"}
    healthy = [sys.executable, *json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])[1:]]
    command = [sys.executable, "-m", "petals.cli.main", "peer", "--bootstrap", "--json"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["peer_id"]
        where = "import petals; print(petals.__file__)"
        found = subprocess.run(
            [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, check=True
        )
        assert found.stdout.decode().startswith(str(installed)), "what was installed runs, and not the clone"
        subprocess.run(healthy, cwd=tmp_path, env=environment, check=True, timeout=60)
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline
        assert not answers(port, 0.5), "the system accepts for a process that hangs; it is not healthy all the same"
        process.send_signal(signal.SIGCONT)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 0
    assert subprocess.run(healthy, cwd=tmp_path, env=environment, check=False, timeout=60).returncode == 1
    assert (tmp_path / "peer.key").exists()


def test_where_to_ask() -> None:
    assert port_of("/ip4/0.0.0.0/tcp/4001 /ip6/::/tcp/4002") == 4001
    assert port_of("") == 31337


async def test_a_peer_of_a_private_swarm_is_healthy_too() -> None:
    """What it says first is no multistream line, but it is a byte."""
    config = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), swarm_key=SwarmKey(bytes(32)))
    async with open_host(create_identity().key_pair, config) as host:
        assert host.port is not None
        assert await trio.to_thread.run_sync(answers, host.port)
