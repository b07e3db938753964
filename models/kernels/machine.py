"""What this machine's memory and arithmetic give: the limits that a server's figures are compared with."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

from petals.models.kernels.float16_weights import halve


def gigaflops(hidden: int, rows: int = 512) -> float:
    """Of a float32 matrix product on this machine, now, the stock one or that of float16_weights.py, whichever is
    faster: the limit of a server that computes for many."""
    dice = torch.Generator().manual_seed(0)  # not the global one, of which the program we are in may know the seed
    many, weight = (torch.randn(size, hidden, generator=dice) for size in (rows, 4 * hidden))
    weight = weight.half().float()
    seconds = [_best(partial(torch.nn.functional.linear, many), [weight])]
    if (half := halve(weight)) is not None:
        seconds.append(_best(lambda _: half.times(many), [weight]))
    return 2 * rows * hidden * 4 * hidden / min(seconds) / 1e9


def gigabytes(hidden: int, total: int = 512 << 20, rounds: int = 10) -> float:
    """Read per second, over and over, of `total` bytes of weights; those of the default are more than caches hold: the
    limit of one user, whose every token reads all weights. Fewer may come from a cache.

    Read by sums and by one row's products, whichever is faster: some libraries' products do not reach the memory's
    speed.
    """
    weights = [torch.full((4 * hidden, hidden), 0.1) for _ in range(max(1, total // (16 * hidden * hidden)))]
    row = torch.full((1, hidden), 0.1)
    best = min(_best(read, weights, rounds) for read in (torch.sum, partial(torch.nn.functional.linear, row)))
    return weights[0].nbytes / best / 1e9


def _best(compute: Callable[[Tensor], object], weights: Sequence[Tensor], rounds: int = 10) -> float:
    """Seconds that it takes with one of these, the best of some rounds over all."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for weight in weights:
            compute(weight)
        seconds.append((time.perf_counter() - started) / len(weights))
    return min(seconds)


def has_gpu() -> bool:
    """Whether torch can compute on one."""
    return torch.cuda.is_available()


def describe_device() -> str:
    """What blocks are computed on where nobody says otherwise."""
    if has_gpu():
        properties = torch.cuda.get_device_properties(0)
        return f"cuda:0, {properties.name}, {properties.total_memory / 1e9:.1f} GB"
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's mallopt."""


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """While open, what is freed of large tensors goes back to the system at once, where the C library is glibc.

    Otherwise it keeps blocks of less than 32 MB in its heap. Loading allocates a matrix to keep, and copies of it to
    throw away, in turn; the holes that these leave are too small by some bytes for the next matrix, so that a server of
    2.5 GB of experts took 5.
    """
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 256 << 10)
    try:
        yield
    finally:  # as large as it would have grown by itself, so that steps do not ask the system for every tensor
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


@cache
def _mallopt() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return None
    return found
