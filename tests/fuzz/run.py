"""The longer run: mutated inputs by the hundred thousand through every decoder, each watched.

    python tests/fuzz/run.py --inputs 100000 [--harness NAME ...] [--seed N] [--seconds S]
    python tests/fuzz/run.py --seeds          write the seed corpus anew from real messages

An input fails when it raises what its decoder does not promise, takes longer than `--limit` seconds, makes the process
hold 64 MiB or reserve 256 MiB more than ever before, or, of those that are traced (one of 16: tracing takes three
quarters of the time), makes Python allocate 64 MiB. Failing inputs are written to tests/fuzz/found/NAME/.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
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
RESERVED_BYTES = 256 << 20
"""Of address space: a thread that begins takes 136 MiB of it."""
TRACED = 16
FOUND = Path(__file__).parent / "found"
DRIFT, MAX_DRIFTED = 50, 100
"""Every so many inputs one joins those that are changed further, in place of an older one."""


class TooSlow(Exception):
    """An input took longer than it may."""


class TooMuch(Exception):
    """An input made Python allocate more than it may."""


def memory() -> tuple[int, int]:
    """Bytes that the process ever held, and ever reserved, at once; what C and C++ allocate is in it."""
    with open("/proc/self/status", "rb") as status:
        words = dict(line.split(b":", 1) for line in status)
    return int(words[b"VmHWM"].split()[0]) << 10, int(words[b"VmPeak"].split()[0]) << 10


def watched(
    harness: Harness, data: bytes, limit: float, *, traced: bool = False
) -> tuple[Exception | None, float, int]:
    """What an input raised, or how it misbehaved otherwise; its seconds; Python's bytes at the peak, if traced."""
    held, reserved = memory()
    if traced:
        tracemalloc.start()
    began, failure, peak = time.perf_counter(), None, 0
    try:
        signal.setitimer(signal.ITIMER_REAL, limit)
        harness.one_input(data)
    except Exception as error:
        failure = error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.perf_counter() - began
        if traced:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    held, reserved = (now - before for now, before in zip(memory(), (held, reserved), strict=True))
    if failure is None and (max(held, peak) > PEAK_BYTES or reserved > RESERVED_BYTES):
        failure = TooMuch(f"{peak >> 20} MiB allocated, {held >> 20} more held, {reserved >> 20} more reserved")
    return failure, seconds, peak


def fuzz(name: str, harness: Harness, options: argparse.Namespace) -> int:
    """Run one decoder; print its figures. Returns how many different bugs it found."""
    dice = Random(f"{options.seed}/{name}")
    pool = corpus_of(name)
    bugs: Counter[str] = Counter()
    harness.one_input(pool[0])  # loads models, starts loops
    Path("/proc/self/clear_refs").write_text("5")  # what that took, is no measure: the most held begins anew
    for data in pool:
        failure, _, _ = watched(harness, data, options.limit, traced=True)
        report(name, data, failure, bugs)
    slowest, peak, seeds, done, started = 0.0, 0, len(pool), 0, time.perf_counter()
    while done < options.inputs and time.perf_counter() - started < options.seconds:
        data = mutate(dice.choice(pool), pool, dice, harness.grammar) if done % 50 else dice.randbytes(done % 300)
        failure, seconds, allocated = watched(harness, data, options.limit, traced=dice.randrange(TRACED) == 0)
        report(name, data, failure, bugs)
        slowest, peak, done = max(slowest, seconds), max(peak, allocated), done + 1
        if done % DRIFT == 0:  # changes pile up, without ever losing the seeds
            pool.append(data)
            del pool[seeds:-MAX_DRIFTED]
    rate, resident = done / (time.perf_counter() - started), memory()[0] >> 20
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
    place = type(error).__name__
    if ours:
        place += f" at {ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}"
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
    print("| decoder | inputs | per second | slowest | peak | resident | bugs |\n" + "|---" * 7 + "|")
    return int(sum(fuzz(name, HARNESSES[name], options) for name in options.harness) > 0)


if __name__ == "__main__":
    sys.exit(main())
