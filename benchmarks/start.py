"""How long a peer takes to start, and what it takes while nobody asks.

    python benchmarks/start.py [--rounds 5] [--idle 20]

`petals --help` and `run_dht` do without torch. A serving peer says itself when it begins to load its blocks and when
they are served; the rest of its time is what it needs besides. CPU seconds are there for machines that do other work,
too: waiting for a core is not in them. Idle: CPU and memory of a serving peer beyond its weights.

A start that does not count comes first. It leaves our modules' byte code behind, as a first start does for everybody
who has not forbidden that (PYTHONDONTWRITEBYTECODE; 0.14 s without), and transformers' table
(models/source/library.py).
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import psutil

PETALS = (sys.executable, "-m", "petals.cli.main")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def first_line(command: Sequence[str]) -> float:
    """Seconds until a command has printed its first line; then it is ended."""
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"{command} ended"
        seconds = time.perf_counter() - started
        process.send_signal(signal.SIGTERM)
    return seconds


class Start(NamedTuple):
    """A serving peer's start. Seconds."""

    ready: float
    loading: float
    """From its line that it loads to its line that it serves."""
    cpu_before: float
    """CPU time until it began to load: nearly all that is not loading."""


def serve(idle: Callable[[psutil.Process], None]) -> Start:
    """Start a peer that serves all blocks of the default model, until it is ready; then `idle`; then end it."""
    command = [*PETALS, "peer", "--serve", "0:30", "--throughput", "100", "--json"]
    started = time.perf_counter()
    marks: dict[str, float] = {}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        watched = psutil.Process(process.pid)
        cpu_before = 0.0
        for line in process.stdout:
            now = time.perf_counter() - started
            if line.startswith("petals: loading blocks"):
                marks["loading"], cpu_before = now, sum(watched.cpu_times()[:2])
            elif line.startswith("petals: serving blocks"):
                marks["serving"] = now
            elif line.startswith("{"):
                marks["ready"] = now
                break
        idle(watched)
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    return Start(marks["ready"], marks["serving"] - marks["loading"], cpu_before)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle", type=float, default=20.0)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    resting: list[str] = []

    def rest(process: psutil.Process) -> None:
        if resting:
            return
        time.sleep(5)  # what follows the start belongs to it
        before = process.cpu_times()
        time.sleep(options.idle)
        after = process.cpu_times()
        busy = after.user + after.system - before.user - before.system
        resting.append(
            f"An idle server of all blocks: {busy / options.idle:.1%} of one core over {options.idle:.0f} s; "
            f"{process.memory_info().rss / 1e6:,.0f} MB resident, weights included"
        )

    def note(name: str, took: float) -> None:
        seconds.setdefault(name, []).append(took)

    serve(lambda _: None)
    for _ in range(options.rounds):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import trio"], check=True, env=ENVIRONMENT)
        note("python, importing trio", time.perf_counter() - started)
        started = time.perf_counter()
        subprocess.run([*PETALS, "--help"], check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
        note("petals --help", time.perf_counter() - started)
        note("run_dht, ready", first_line([sys.executable, "-m", "petals.cli.run_dht", "--json"]))
        start = serve(rest)
        note("peer --serve 0:30, ready", start.ready)
        note("of it: loading the blocks, self-test included", start.loading)
        note("the rest: imports, host, directory", start.ready - start.loading)
        note("CPU time before the loading", start.cpu_before)
    print("| start | seconds, median (min - max) |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f}) |")
    print(f"\n{resting[0]}.")


if __name__ == "__main__":
    main()
