"""New tokens of several sessions as rows of one pass through blocks: continuous batching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from petals.models.adapters import Lora
from petals.models.cache import SpanCache

PASS_ROWS = 128
"""Rows (tokens of all sequences together) up to which steps share a pass; above, the library's way is as fast."""


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
    """(batch, end) int64: 0 for tokens that are padding, none of them new; None: there are none."""
    lora: Lora | None


def in_parts(
    hidden: Sequence[Tensor],
    caches: Sequence[SpanCache],
    masks: Sequence[Tensor | None],
    loras: Sequence[Lora | None],
    run: Callable[[range, Sequence[Tensor], Sequence[Part]], Sequence[Tensor]],
) -> list[Tensor]:
    """Take several sessions, which may use different ranges of blocks, through all of their blocks.

    Args:
        hidden: for each (batch, tokens, hidden_size); masks, loras: as in `Part`.
        run: takes the rows (rows, hidden_size) of sessions through blocks that all of them use.
    Returns: the sessions' outputs, shapes as given.
    """
    states = [rows.reshape(-1, rows.shape[2]) for rows in hidden]
    begun = [cache.position for cache in caches]
    edges = sorted({edge for cache in caches for edge in (cache.blocks.start, cache.blocks.stop)})
    for start, stop in pairwise(edges):
        here = [i for i, cache in enumerate(caches) if start in cache.blocks]
        parts, first = list[Part](), 0
        for i in here:
            batch, tokens, _ = hidden[i].shape
            end, count = begun[i] + tokens, batch * tokens
            parts.append(Part(caches[i], batch, tokens, begun[i], end, first, count, masks[i], loras[i]))
            first += count
        if parts:
            outputs = run(range(start, stop), [states[i] for i in here], parts)
            for i, rows in zip(here, outputs, strict=True):
                states[i] = rows
    return [rows.view(given.shape) for rows, given in zip(states, hidden, strict=True)]


def positions(parts: Sequence[Part], device: torch.device) -> Tensor:
    """Of all rows: (rows,) int64, as `transformers.generate` counts them: padding does not count."""
    numbers: list[int] = []
    for part in parts:
        for padding in [0] * part.batch if part.mask is None else (part.mask == 0).sum(1).tolist():
            numbers.extend(range(part.position - padding, part.end - padding))
    return torch.tensor(numbers, device=device)
