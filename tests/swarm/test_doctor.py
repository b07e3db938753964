"""`petals doctor`: what it finds on this machine and in real swarms, and what it says to do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from petals.cli.doctor import checks
from petals.cli.doctor.checks import Finding, Subject, examine
from petals.cli.doctor.doctor import describe
from petals.cli.main import parse
from petals.cli.status.render import picture
from petals.cli.status.status import as_json
from petals.peer.base.identity import create_identity
from petals.peer.bootstrap import open_bootstrap
from petals.peer.membership.observer import open_observer
from petals.peer.net.host import HostConfig, open_host
from tests.cli.test_commands import ENVIRONMENT, PETALS, ROOT
from tests.swarm.conftest import Swarm, Truth

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWHtURmmUjrRwSiMY8FcjtDevyhTTAQAMRfBKuz8ErYeAT"


async def found(check: str, subject: Subject) -> list[Finding]:
    """What the doctor says under that heading."""
    findings: list[Finding] = []
    await examine(subject, findings.append)
    return [finding for finding in findings if finding.check == check]


@pytest.fixture
def only_the_swarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MACHINE", ())


@pytest.mark.usefixtures("only_the_swarm")
async def test_each_initial_peer_is_looked_at(
    make_swarm: Callable[[str | None], Swarm], tiny_truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_swarm(str(tiny_truth.directory))
    server = await swarm.add(range(3))
    findings: list[Finding] = []
    async with (
        open_bootstrap(identity=None, listen=LOOPBACK, initial_peers=server.addrs) as keeper,
        open_host(create_identity().key_pair, HostConfig(listen=LOOPBACK)) as stranger,
    ):
        port = keeper.addrs[0].split("/")[4]
        by_name = f"/dns4/localhost/tcp/{port}/p2p/{keeper.peer_id}"
        mistaken = f"/ip4/127.0.0.1/tcp/{port}/p2p/{server.peer_id}"
        lost = NOBODY.replace("/ip4/127.0.0.1", "/dns4/no.such.name.invalid")
        addrs = (server.addrs[0], by_name, stranger.addrs[0], NOBODY, lost, "nonsense")
        await examine(Subject(listen=LOOPBACK, initial_peers=addrs), findings.append)
        taken = (keeper.addrs[0].partition("/p2p/")[0],)
        wrong = await found("initial peer", Subject(listen=taken, initial_peers=(mistaken,)))
    peers = [finding for finding in findings if finding.check == "initial peer"]
    said = [(finding.state, finding.text) for finding in peers]
    assert said[0][0] == "ok"
    assert "serves blocks" in said[0][1]
    assert peers[0].figures["round_trip_s"] > 0
    assert said[1] == ("ok", "localhost is 127.0.0.1")
    assert "keeps the directory" in said[2][1]
    for (state, text), reason in zip(
        said[3:], ("does not speak our protocols", "refused", "cannot be resolved", "is no full address"), strict=True
    ):
        assert state == "problem"
        assert reason in text
    assert all(finding.advice for finding in peers if finding.state == "problem")
    assert "check the peer ID" in wrong[0].advice
    clocks = [finding for finding in findings if finding.check == "clock"]
    assert [clock.state for clock in clocks] == ["ok", "ok"]  # of the server, and of who only keeps the directory
    assert all(abs(clock.figures["ahead_s"]) <= clock.figures["exact_s"] for clock in clocks)
    (model,) = [finding for finding in findings if finding.check == "model"]
    assert (model.state, model.figures["health"]) == ("problem", "broken")
    assert "--serve 3:4" in model.advice

    monkeypatch.setattr(checks, "time", SimpleNamespace(time=lambda: time.time() - 100))
    (clock,) = await found("clock", Subject(listen=LOOPBACK, initial_peers=server.addrs))
    assert clock.state == "problem"
    assert clock.figures["ahead_s"] == pytest.approx(100, abs=1)
    assert re.search(r"is (99\.9|100\.)", clock.text)
    assert "ahead of ours" in clock.text


@pytest.mark.usefixtures("only_the_swarm")
async def test_a_key_on_two_machines_is_reported_by_both_and_by_whoever_looks(
    make_swarm: Callable[[str | None], Swarm], tiny_truth: Truth, tmp_path: Path, nursery: trio.Nursery
) -> None:
    swarm = make_swarm(str(tiny_truth.directory))
    first = await swarm.add()
    create_identity(tmp_path / "my.key")
    servers = [
        await swarm.add(blocks, identity=tmp_path / "my.key", also={"initial_peers": first.addrs}, announce_s=1.0)
        for blocks in (range(2), range(2, 4))
    ]
    with trio.fail_after(60):
        while not all(each.warnings() for each in servers):  # noqa: ASYNC110  # a poll of the state waited for
            await trio.sleep(0.05)
    assert "uses this peer's key and holds blocks 2:4" in servers[0].warnings()[0]
    assert "uses this peer's key and holds blocks 0:2" in servers[1].warnings()[0]
    (keys,) = await found("keys", Subject(listen=LOOPBACK, initial_peers=first.addrs))
    assert keys.state == "problem"
    assert keys.advice == "give each process its own --identity"
    async with open_observer(first.addrs) as observer:
        told = {"models": [as_json(model) for model in await observer.look()], "warnings": observer.warnings()}
    assert f"two processes announce with the key of peer …{servers[0].peer_id[-6:]}" in picture(told)
    nursery.cancel_scope.cancel()


async def test_versions_out_of_range_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MACHINE", (checks.packages,))
    assert {each.state for each in await found("packages", Subject(listen=LOOPBACK))} == {"ok"}
    wanted = ["trio<0.1", "no-such-package>=3", "peft>=99; extra == 'peft'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    problems = [each for each in await found("packages", Subject(listen=LOOPBACK)) if each.state == "problem"]
    assert [each.advice for each in problems] == ['pip install "trio<0.1"', 'pip install "no-such-package>=3"']

    def uninstalled(_: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "metadata", uninstalled)
    assert {each.state for each in await found("packages", Subject(listen=LOOPBACK))} == {"ok"}


async def test_a_broken_package_does_not_end_the_other_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(subject: Subject, tell: checks.Tell) -> None:
        raise ImportError("libtorch.so: cannot open shared object file")

    monkeypatch.setattr(checks, "MACHINE", (broken, checks.packages))
    findings: list[Finding] = []
    await examine(Subject(listen=LOOPBACK), findings.append)
    assert findings[0].state == "problem"
    assert "libtorch.so" in findings[0].text
    assert len(findings) > 1


def test_the_command_on_a_machine_with_problems(tmp_path: Path) -> None:
    """Two of them: the cache is a file, and the port is taken."""
    (tmp_path / "cache").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        addr = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        environment = ENVIRONMENT | {"PETALS_CACHE": str(tmp_path / "cache"), "PETALS_LISTEN": addr}
        done = subprocess.run(
            [*PETALS, "doctor", "--json"], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
        )
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    problems = [finding for finding in said["findings"] if finding["state"] == "problem"]
    assert said["problems"] == 2
    assert [finding["check"] for finding in problems] == ["disk", "listening"]
    assert "PETALS_CACHE" in problems[0]["advice"]
    (device,) = [finding for finding in said["findings"] if finding["check"] == "device"]
    assert device["figures"]["memory_read_gb_s"] > 0


async def test_exit_codes_and_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PETALS_CACHE", str(tmp_path))
    monkeypatch.setattr(checks, "MACHINE", (checks.disk, checks.listening))
    options = parse(["doctor"])
    assert await options.run(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok      disk: ")
    assert lines[1].startswith("ok      listening: can listen on /ip4/127.0.0.1/tcp/")
    assert lines[-1] == "no problems"
    assert not os.listdir(tmp_path), "what was written to measure is gone"
    options = parse(["doctor", "--initial_peers", NOBODY])
    assert await options.run(options) == 1
    assert capsys.readouterr().out.endswith("1 problem\n")
    problem = Finding("disk", "problem", "full", "make room")
    assert describe(problem, bright=True) == "\x1b[31m✗\x1b[0m disk: full\n  -> make room"
    assert describe(problem, bright=False) == "problem disk: full\n        -> make room"
