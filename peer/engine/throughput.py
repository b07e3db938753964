"""How fast this machine computes the blocks it holds: measured after loading, and from then on by the work itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from petals.models.blocks.block import BlockSpan


@dataclass(frozen=True, slots=True)
class Throughput:
    """Blocks passed per second: by one token of one sequence, and by one token of a long sequence."""

    inference_rps: float
    forward_rps: float


SMOOTHING = 0.05
"""Weight of one new measurement: a pause of the machine is forgotten after some dozens of steps."""
LONG = 32
"""Tokens from which on a step counts as a long sequence."""


class Speedometer:
    """Keeps a `Throughput` true: every step that is a pure case of one of its two figures is a measurement of it."""

    def __init__(self, measured: Throughput, *, fixed: bool = False) -> None:
        """`fixed`: the operator has said the figure, and no measurement changes it."""
        self.throughput = measured
        self._fixed = fixed

    def note(self, blocks: int, rows: int, tokens: int, compute_s: float) -> None:
        """One step of `tokens` new tokens in each of `rows` sequences through `blocks` took `compute_s`."""
        if self._fixed or compute_s <= 0:
            return
        rps = blocks * rows * tokens / compute_s
        old = self.throughput
        if rows == tokens == 1:
            self.throughput = replace(old, inference_rps=_smoothed(old.inference_rps, rps))
        elif rows * tokens >= LONG:
            self.throughput = replace(old, forward_rps=_smoothed(old.forward_rps, rps))


def _smoothed(old: float, new: float) -> float:
    """Over seconds per block, not blocks per second: one lucky step must not count for many slow ones."""
    return 1 / ((1 - SMOOTHING) / old + SMOOTHING / new) if old > 0 else new


def measure_throughput(
    span: BlockSpan, *, decode_steps: int = 6, prefill_tokens: int = 128, clock: Callable[[], float] = time.perf_counter
) -> Throughput:
    """Median decode step after one warm-up, and one prefill, both over the whole span."""
    span.calibrate()
    cache = span.new_cache(span.blocks, 1, decode_steps + 1 + prefill_tokens)
    token = torch.zeros(1, 1, span.hidden_size, dtype=span.dtype)
    prompt = torch.zeros(1, prefill_tokens, span.hidden_size, dtype=span.dtype)
    span.step(token, cache)
    times: list[float] = []
    for _ in range(decode_steps):
        started = clock()
        span.step(token, cache)
        times.append(clock() - started)
    started = clock()
    span.step(prompt, cache)
    prefill_s = clock() - started
    blocks = len(span.blocks)
    return Throughput(blocks / sorted(times)[len(times) // 2], blocks * prefill_tokens / prefill_s)
