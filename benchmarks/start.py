"""How long a peer takes to start, and what it takes while nobody asks.

    python benchmarks/start.py [--rounds 5] [--idle 20]

`petals --help` and `run_dht` do without torch; a serving peer is compared with the loading of its blocks alone, in a
process of its own that has imported the same. Idle: CPU and memory of a serving peer beyond its weights.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import psutil

PETALS = (sys.executable, "-m", "petals.cli.main")
LOAD = """
import time
import petals.peer.node
from petals.models.checkpoint import open_checkpoint
from petals.models.loading import load_span
checkpoint = open_checkpoint()
began = time.perf_counter()
load_span(checkpoint, range(30))
print(time.perf_counter() - began)
"""


def first_line(
    command: Sequence[str], idle: Callable[[psutil.Process, dict[str, object]], None] | None = None
) -> float:
    """Seconds until a command has printed its first line; then it is ended."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"{command} ended"
        seconds = time.perf_counter() - started
        if idle is not None:
            idle(psutil.Process(process.pid), json.loads(line))
        process.send_signal(signal.SIGTERM)
    return seconds


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle", type=float, default=20.0)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    resting: list[str] = []

    def rest(process: psutil.Process, described: dict[str, object]) -> None:
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

    for _ in range(options.rounds):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import trio"], check=True)
        note("python, importing trio", time.perf_counter() - started)
        started = time.perf_counter()
        subprocess.run([*PETALS, "--help"], check=True, stdout=subprocess.DEVNULL)
        note("petals --help", time.perf_counter() - started)
        note("run_dht, ready", first_line([sys.executable, "-m", "petals.cli.run_dht", "--json"]))
        ready = first_line([*PETALS, "peer", "--serve", "0:30", "--throughput", "100", "--json"], rest)
        note("peer --serve 0:30, ready", ready)
        loaded = subprocess.run([sys.executable, "-c", LOAD], check=True, capture_output=True, text=True)
        note("of it: loading the blocks, self-test included", float(loaded.stdout))
        note("the rest: imports, host, directory", ready - float(loaded.stdout))
    print("| start | seconds, median (min - max) |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f}) |")
    print(f"\n{resting[0]}.")


if __name__ == "__main__":
    main()
