"""How many cores this process may keep busy, where its cgroup (a container, a systemd unit) has a quota of CPU time.

Libraries start a thread for each core they see. They see an affinity mask, but no quota: in a container with two of a
machine's sixty-four cores they start sixty-four threads, use up the quota in the first moments of every period and
then all stand still. Threads that wait for one another spin, so even a fraction of a core more than the quota is felt.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path

THREADS = "OMP_NUM_THREADS"
SPINNING = "GOMP_SPINCOUNT"


def honour_quota(environ: MutableMapping[str, str], root: Path = Path("/")) -> None:
    """Let libraries that are imported from now on use as many threads as the quota feeds; who has said a number keeps
    it."""
    cores = quota(root)
    if cores is not None and cores < len(_affinity()):
        environ.setdefault(THREADS, str(max(1, int(cores))))


def yield_idle_cores(environ: MutableMapping[str, str]) -> None:
    """Let threads of OpenMP that wait for each other give their core up soon. Has an effect before torch is imported.

    libgomp, which torch brings, lets them spin for milliseconds: all the while a server's thread takes the core from
    which its neighbour, or the client, should answer. A tenth of a millisecond bridges the gap to the next product.
    Measured on two cores (torch 2.13): alone 3 % slower, a token through two servers 10 % sooner, loading on a busy
    machine 9 s instead of 46. Only the command line does it, whose process is ours; a program that serves sets the
    variable itself (docs/deploy.md).
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault(SPINNING, "3000")


def _affinity() -> set[int]:
    """Cores this process may run on; all of them where the system has no such thing."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def quota(root: Path) -> float | None:
    """Seconds of CPU time per second that this process's cgroup and those around it leave it; None: no known limit."""
    return min(_quotas(root), default=None)


def _quotas(root: Path) -> Iterator[float]:
    with suppress(OSError):  # not Linux, or no cgroups
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            mounted = root / "sys/fs/cgroup" / ("" if controllers == "" else "cpu")
            if controllers and "cpu" not in controllers.split(","):
                continue
            inside = Path(path.lstrip("/"))
            for folder in (inside, *inside.parents):  # seen from inside a container, `path` may be the host's
                yield from _limit(mounted / folder)


def _limit(folder: Path) -> Iterator[float]:
    """What one cgroup allows: of version 2, or of version 1."""
    with suppress(OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        allowed, period = (folder / "cpu.max").read_text().split()
        yield int(allowed) / int(period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        allowed, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(allowed) > 0:  # -1: no limit
            yield int(allowed) / int(period)
