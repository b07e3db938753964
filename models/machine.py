"""What this machine's memory and arithmetic give: the limits that a server's figures are compared with."""

from __future__ import annotations

import time

import torch
from torch import Tensor


def gigaflops(hidden: int, rows: int = 512) -> float:
    """Of a float32 matrix product on this machine, now: the limit of a server that computes for many."""
    return 2 * rows * hidden * 4 * hidden / _best(torch.randn(rows, hidden), torch.randn(4 * hidden, hidden)) / 1e9


def gigabytes(hidden: int, total: int = 512 << 20, rounds: int = 10) -> float:
    """Of weights read per second by one row's products with more than caches hold: the limit of one user."""
    weights = [torch.full((4 * hidden, hidden), 0.1) for _ in range(total // (16 * hidden * hidden))]
    return weights[0].nbytes / _best(torch.randn(1, hidden), *weights, rounds=rounds) / 1e9


def _best(rows: Tensor, *weights: Tensor, rounds: int = 10) -> float:
    """Seconds of one product, the best of some rounds over all weights."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(rows, weight)
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
    return f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
