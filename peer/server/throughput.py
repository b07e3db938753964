"""How fast this machine computes the blocks it holds: measured once after loading, in the compute thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from petals.models.block import BlockSpan


@dataclass(frozen=True, slots=True)
class Throughput:
    """Blocks passed per second: by one token of one sequence, and by one token of a long sequence."""

    inference_rps: float
    forward_rps: float


def measure_throughput(
    span: BlockSpan, *, decode_steps: int = 6, prefill_tokens: int = 128, clock: Callable[[], float] = time.perf_counter
) -> Throughput:
    """Median decode step after one warm-up, and one prefill, both over the whole span."""
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
