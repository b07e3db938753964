"""What benchmarks share: servers as processes of their own, and rounds in which all contestants take turns."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager


@contextmanager
def server(*words: str, threads: int | None = None, inside: Sequence[str] = ()) -> Iterator[str]:
    """A serving peer in a process; yields its address.

    Args:
        inside: a command that runs the command that follows.
        threads: of its torch; more servers than cores wait for each other's threads if each has several.
    """
    command = [*inside, sys.executable, "-m", "petals.cli.main", "peer", *words, "--json"]
    environment = (
        {"PETALS_LISTEN": "/ip4/127.0.0.1/tcp/0"}
        | os.environ
        | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["addrs"][0]
        process.send_signal(signal.SIGTERM)


@contextmanager
def two_servers(blocks: int, *words: str, threads: int | None = None) -> Iterator[str]:
    """Two servers with half of a model's blocks each; yields an address to join through."""
    half = blocks // 2
    with (
        server(*words, "--serve", f"0:{half}", threads=threads) as first,
        server(*words, "--serve", f"{half}:{blocks}", "--initial_peers", first, threads=threads),
    ):
        yield first


def take_turns(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one round that does not count. They take turns, so that a
    machine that drifts drifts for all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(rounds + 1):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if index:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def table(title: str, seconds: Mapping[str, list[float]], amount: float, unit: str) -> str:
    """A Markdown table of `amount` per second, as ratios to the first contestant."""
    rows = [f"| {title} | {unit}, median (min - max) | ratio |", "|---|---|---|"]
    base = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        median = statistics.median(values)
        low, high = amount / max(values), amount / min(values)
        rows.append(f"| {name} | {amount / median:,.1f} ({low:,.1f} - {high:,.1f}) | {base / median:.2f} |")
    return "\n".join(rows)
