"""What a replacement is told after a fail-over: the history as it was, or in as few steps as possible. Pure.

Told with the same step boundaries, a replacement computes the same cache to the last bit: it multiplies matrices of the
same shapes. Told as one long prompt it computes the same numbers up to rounding, and much faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from petals.peer.client.hops.hop import StepInput

CHUNK_TOKENS = 1024
"""Of one row, per step of a fast replay: a server must be able to take it, and to let others in between."""


def as_one_prompt(history: Sequence[StepInput], chunk_tokens: int = CHUNK_TOKENS) -> list[StepInput]:
    """The fewest steps that lead to the cache of `history`, in which steps follow one another without gaps.

    Rows that later steps reordered are told in their final order. A history whose attention masks contradict one
    another, which no prompt could reproduce, is given back as it is.
    """
    if len(history) < 2 or any(step.position != end for step, end in zip(history[1:], _ends(history), strict=False)):
        return list(history)
    hidden, prompts, mask = history[0].hidden, history[0].prompts, history[0].attention_mask
    for before, step in pairwise(history):
        if step.hypo_ids is not None:
            hidden = hidden[step.hypo_ids]
            prompts = None if prompts is None else prompts[:, step.hypo_ids]
            mask = None if mask is None else mask[step.hypo_ids]
        if not _continues(mask, step, before.position + before.hidden.shape[1]):
            return list(history)
        hidden, mask = torch.cat([hidden, step.hidden], dim=1), step.attention_mask
    first = replace(history[0], hidden=hidden, prompts=prompts, attention_mask=mask, hypo_ids=None)
    return in_chunks(first, max(chunk_tokens, 0 if prompts is None else prompts.shape[2]))


def _ends(history: Sequence[StepInput]) -> list[int]:
    return [step.position + step.hidden.shape[1] for step in history]


def _continues(mask: Tensor | None, step: StepInput, known: int) -> bool:
    """Whether a step sees the tokens before it as the steps before it did."""
    if step.attention_mask is None or mask is None:
        return step.attention_mask is None and mask is None
    return torch.equal(step.attention_mask[:, :known], mask)


def in_chunks(whole: StepInput, tokens: int = CHUNK_TOKENS) -> list[StepInput]:
    """The same step in several of at most `tokens` each."""
    start, mask = whole.position, whole.attention_mask
    return [
        StepInput(
            position=start + begin,
            hidden=part,
            attention_mask=None if mask is None else mask[:, : start + begin + part.shape[1]],
            prompts=whole.prompts if begin == 0 else None,
        )
        for begin in range(0, whole.hidden.shape[1], tokens)
        for part in [whole.hidden[:, begin : begin + tokens]]
    ]
