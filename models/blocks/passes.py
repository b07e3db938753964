"""New tokens of several sessions as rows of one pass through blocks: continuous batching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from petals.models.blocks.adapters import Lora
from petals.models.blocks.cache import SpanCache

PASS_ROWS = 128
"""Rows (tokens of all sequences together) up to which steps share a pass; above, the library's way is as fast."""


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What one session brings to a pass; that its cache has room was checked."""

    hidden: Tensor
    """(batch, tokens, hidden_size), dtype and device of the span."""
    cache: SpanCache
    mask: Tensor | None = None
    """(batch, position + tokens) int64: 0 for tokens that are padding, none of them new; None: there are none."""
    lora: Lora | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One session's share of a pass: `tokens` new tokens in each of `batch` sequences, from `position` to `end`; they
    are `rows` rows of the pass from `first` on."""

    cache: SpanCache
    batch: int
    tokens: int
    position: int
    end: int
    first: int
    rows: int
    mask: Tensor | None
    """As in `NewTokens`."""
    lora: Lora | None


def in_parts(
    sessions: Sequence[NewTokens], run: Callable[[range, Sequence[Tensor], Sequence[Part]], Sequence[Tensor]]
) -> list[Tensor]:
    """Take several sessions, which may use different ranges of blocks, through all of their blocks.

    Args:
        run: takes the rows (rows, hidden_size) of sessions through blocks that all of them use.
    Returns: the sessions' outputs, shapes as given.
    """
    states = [session.hidden.reshape(-1, session.hidden.shape[2]) for session in sessions]
    begun = [session.cache.position for session in sessions]
    ranges = [session.cache.blocks for session in sessions]
    edges = sorted({edge for blocks in ranges for edge in (blocks.start, blocks.stop)})
    for start, stop in pairwise(edges):
        here = [i for i, blocks in enumerate(ranges) if start in blocks]
        parts, first = list[Part](), 0
        for i in here:
            session = sessions[i]
            batch, tokens, _ = session.hidden.shape
            end, count = begun[i] + tokens, batch * tokens
            parts.append(Part(session.cache, batch, tokens, begun[i], end, first, count, session.mask, session.lora))
            first += count
        if parts:
            outputs = run(range(start, stop), [states[i] for i in here], parts)
            for i, rows in zip(here, outputs, strict=True):
                states[i] = rows
    return [rows.view(session.hidden.shape) for rows, session in zip(states, sessions, strict=True)]


def positions(parts: Sequence[Part], device: torch.device) -> Tensor:
    """Of all rows: (rows,) int64, as `transformers.generate` counts them: padding does not count."""
    numbers: list[int] = []
    for part in parts:
        for padding in [0] * part.batch if part.mask is None else (part.mask == 0).sum(1).tolist():
            numbers.extend(range(part.position - padding, part.end - padding))
    return torch.tensor(numbers, device=device)
