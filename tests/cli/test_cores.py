"""Threads for the CPU time there is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from petals.cli.cores import SPINNING, THREADS, honour_quota, quota, yield_idle_cores

V1, V2 = "4:memory:/here\n1:cpu,cpuacct:/here/unit\n", "0::/here/unit\n"


def machine(root: Path, cgroups: str, files: Mapping[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroups", "files", "cores"),
    [
        (V2, {"sys/fs/cgroup/here/unit/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"sys/fs/cgroup/here/unit/cpu.max": "max 100000\n"}, None),
        (V2, {f"sys/fs/cgroup/here/{part}cpu.max": f"{n}00000 100000\n" for part, n in (("", 3), ("unit/", 8))}, 3.0),
        (V2, {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4.0),
        (
            V1,
            {f"sys/fs/cgroup/cpu/here/unit/cpu.cfs_{n}_us": v for n, v in (("quota", "50000"), ("period", "100000"))},
            0.5,
        ),
        (V1, {f"sys/fs/cgroup/cpu/cpu.cfs_{n}_us": v for n, v in (("quota", "-1"), ("period", "100000"))}, None),
        ("", {}, None),
    ],
    ids=["v2", "v2-unlimited", "v2-parents", "v2-container", "v1", "v1-unlimited", "none"],
)
def test_the_least_quota_counts(cgroups: str, files: Mapping[str, str], cores: float | None, tmp_path: Path) -> None:
    assert quota(machine(tmp_path, cgroups, files)) == cores


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    assert quota(tmp_path) is None


def test_threads_are_what_the_quota_feeds_unless_somebody_has_said_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    small = machine(tmp_path / "small", V2, {"sys/fs/cgroup/cpu.max": "250000 100000\n"})
    tiny = machine(tmp_path / "tiny", V2, {"sys/fs/cgroup/cpu.max": "10000 100000\n"})
    large = machine(tmp_path / "large", V2, {"sys/fs/cgroup/cpu.max": "800000 100000\n"})
    for root, before, after in (
        (small, {}, {THREADS: "2"}),
        (tiny, {}, {THREADS: "1"}),
        (small, {THREADS: "7"}, {THREADS: "7"}),
        (large, {}, {}),
    ):
        environ: dict[str, str] = dict(before)
        honour_quota(environ, root)
        assert environ == after


@pytest.mark.parametrize(
    ("given", "after"),
    [
        ({}, {SPINNING: "3000"}),
        ({SPINNING: "7"}, {SPINNING: "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
    ids=["default", "said", "policy"],
)
def test_threads_that_wait_soon_give_their_core_up(given: Mapping[str, str], after: Mapping[str, str]) -> None:
    environ = dict(given)
    yield_idle_cores(environ)
    assert environ == after


def test_the_command_line_sets_it_before_torch_is_imported_and_importing_petals_sets_nothing() -> None:
    environ = {name: value for name, value in os.environ.items() if name not in (SPINNING, "OMP_WAIT_POLICY")}
    code = (
        "import os, sys, petals; assert 'GOMP_SPINCOUNT' not in os.environ\n"
        "from petals.cli import main as cli\n"
        "cli.run = lambda _: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)\n"
        "cli.main(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3000 False"
