"""The longer run: mutated inputs by the hundred thousand through every decoder, each watched.

    python tests/fuzz/run.py --inputs 100000 [--harness NAME ...] [--seed N] [--seconds S]
    python tests/fuzz/run.py --seeds          write the seed corpus anew from real messages

An input fails when it raises what its decoder does not promise, takes longer than `--limit` seconds, or makes Python
allocate more than 64 MiB at its peak. Failing inputs are written to tests/fuzz/found/NAME/.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import resource
import signal
import sys
import time
import traceback
import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from tests.fuzz.harnesses import CORPUS, HARNESSES, Harness, corpus_of  # noqa: E402
from tests.fuzz.mutate import mutate  # noqa: E402

PEAK_BYTES = 64 << 20
FOUND = Path(__file__).parent / "found"
DRIFT, MAX_DRIFTED = 50, 100
"""Every so many inputs one joins those that are changed further, in place of an older one."""


class TooSlow(Exception):
    """An input took longer than it may."""


class TooMuch(Exception):
    """An input made Python allocate more than it may."""


def watched(harness: Harness, data: bytes, limit: float) -> tuple[Exception | None, float, int]:
    """What an input raised, or how it misbehaved otherwise; its seconds; its bytes at the peak."""
    tracemalloc.reset_peak()
    base, _ = tracemalloc.get_traced_memory()
    began, failure = time.perf_counter(), None
    try:
        signal.setitimer(signal.ITIMER_REAL, limit)
        harness.one_input(data)
    except Exception as error:
        failure = error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1] - base
    if failure is None and peak > PEAK_BYTES:
        failure = TooMuch(f"{peak >> 20} MiB")
    return failure, seconds, peak


def fuzz(name: str, harness: Harness, options: argparse.Namespace) -> int:
    """Run one decoder; print its figures. Returns how many different bugs it found."""
    dice = Random(f"{options.seed}/{name}")
    pool = corpus_of(name)
    bugs: Counter[str] = Counter()
    watched(harness, pool[0], 600)  # loads models, starts loops
    for data in pool:
        failure, _, _ = watched(harness, data, options.limit)
        report(name, data, failure, bugs)
    slowest, peak, seeds, done, started = 0.0, 0, len(pool), 0, time.perf_counter()
    while done < options.inputs and time.perf_counter() - started < options.seconds:
        data = mutate(dice.choice(pool), pool, dice, harness.grammar) if done % 50 else dice.randbytes(done % 300)
        failure, seconds, allocated = watched(harness, data, options.limit)
        report(name, data, failure, bugs)
        slowest, peak, done = max(slowest, seconds), max(peak, allocated), done + 1
        if done % DRIFT == 0:  # changes pile up, without ever losing the seeds
            pool.append(data)
            del pool[seeds:-MAX_DRIFTED]
    rate = done / (time.perf_counter() - started)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"| {name} | {done:,} | {rate:,.0f} | {1e3 * slowest:.0f} ms | {peak / 2**20:.1f} MiB | {resident} MiB "
        f"| {len(bugs)} |",
        flush=True,
    )
    return len(bugs)


def report(name: str, data: bytes, error: Exception | None, bugs: Counter[str]) -> None:
    """Keep the first input of each bug, told apart by where it was raised."""
    if error is None:
        return
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/tests/fuzz/" not in frame.filename] or frames
    place = (
        f"{type(error).__name__} at {ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else repr(error)
    )
    bugs[place] += 1
    if bugs[place] == 1:
        (FOUND / name).mkdir(parents=True, exist_ok=True)
        path = FOUND / name / hashlib.sha256(data).hexdigest()[:16]
        path.write_bytes(data)
        print(f"{name}: {place}: {str(error)[:200]!r} -> {path.relative_to(ROOT)}", file=sys.stderr, flush=True)


def write_seeds() -> None:
    """Every file is named by its content: nothing is overwritten, and what found a bug stays."""
    for name, harness in HARNESSES.items():
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        for data in harness.seeds():
            (CORPUS / name / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def main() -> int:
    """Returns 1 when a bug was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="for each decoder")
    parser.add_argument("--harness", nargs="+", choices=HARNESSES, default=list(HARNESSES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each decoder, at most")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds for one input")
    parser.add_argument("--seeds", action="store_true", help="write the seed corpus and stop")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if options.seeds:
        write_seeds()
        return 0

    def too_slow(_: int, __: FrameType | None) -> None:
        raise TooSlow(f"over {options.limit:g} s")

    signal.signal(signal.SIGALRM, too_slow)
    tracemalloc.start()
    print("| decoder | inputs | per second | slowest | peak | resident | bugs |\n" + "|---" * 7 + "|")
    return int(sum(fuzz(name, HARNESSES[name], options) for name in options.harness) > 0)


if __name__ == "__main__":
    sys.exit(main())
