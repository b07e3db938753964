"""docs/private-swarm.md, command by command, in two folders that stand for two hosts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "private-swarm.md").read_text()


def commands() -> list[list[str]]:
    """The page's commands, block by block; the port is any free one."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    return [block.replace("/tcp/31337", "/tcp/0").strip().splitlines() for block in blocks]


class Machine:
    """A folder, and a shell in it that knows `petals`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        petals = folder / "bin" / "petals"
        petals.write_text(f'#!/bin/sh\nexec {sys.executable} -m petals.cli.main "$@"\n')
        petals.chmod(0o755)
        path = f"{petals.parent}:{os.environ['PATH']}"
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path}

    def run(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment | variables, capture_output=True, text=True,
            check=True, timeout=250,
        )  # fmt: skip

    def start(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", f"exec {command} --json"], cwd=self.folder, env=self.environment, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip


@pytest.mark.swarm
def test_from_nothing_to_a_swarm_of_two_hosts(tmp_path: Path) -> None:
    one, two = Machine(tmp_path / "one"), Machine(tmp_path / "two")
    (make_swarm_key, make_name, serve), (make_second_name,), (invite,), (join,) = commands()
    one.run(make_swarm_key)
    name = one.run(make_name).stdout.strip()
    server = one.start(serve)
    try:
        assert server.stdout is not None
        said = json.loads(server.stdout.readline())
        assert said["peer_id"] == name
        second = two.run(make_second_name).stdout.strip()
        invited = one.run(invite, ADDR=said["addrs"][-1], TWO=second)
        assert "THIS TOKEN CONTAINS THE SWARM KEY" in invited.stderr
        (two.folder / "two.token").write_text((one.folder / "two.token").read_text())
        asked = two.run(join)
        assert asked.stdout.startswith("A cat sat on")
        assert len(asked.stdout) > 40
        assert f"0:15 via …{name[-6:]}" in asked.stderr
        secret = (one.folder / "swarm.key").read_text().split()[-1]
        assert not [text for text in (invited.stderr, asked.stdout, asked.stderr) if secret in text]
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
        assert server.returncode == 0
    finally:
        if server.poll() is None:
            server.kill()
            server.communicate()
