"""A caller's own mistakes are found here, before anything is sent: servers would refuse it, one after another."""

from __future__ import annotations

import torch
from torch import Tensor

from petals.models.errors import StepError


def checked_hidden(hidden: Tensor, hidden_size: int) -> None:
    """Raises StepError unless `hidden` is (batch, tokens, hidden_size), floating, with a row at least."""
    if hidden.dim() != 3 or hidden.shape[2] != hidden_size or not hidden.shape[0]:
        raise StepError(f"hidden states must be (batch, tokens, {hidden_size}), got {tuple(hidden.shape)}")
    if not hidden.is_floating_point():
        raise StepError(f"hidden states must be floating, got {hidden.dtype}; embed token ids first")


def checked_prompts(prompts: Tensor | None, hidden: Tensor, num_blocks: int) -> Tensor | None:
    """Prompts of one row for all rows, as they are otherwise.

    Raises:
        StepError: not (num_blocks, batch or 1, at most the tokens of hidden, hidden_size).
    """
    if prompts is None:
        return None
    batch, tokens, size = hidden.shape
    shape = tuple(prompts.shape)
    fits = (
        len(shape) == 4
        and shape[0] == num_blocks
        and shape[1] in (1, batch)
        and shape[2] <= tokens
        and shape[3] == size
    )
    if not fits:
        raise StepError(
            f"prompts must be ({num_blocks}, {batch}, at most {tokens}, {size}): one for each block, got {shape}"
        )
    return prompts.expand(-1, batch, -1, -1)


def checked_rows(hypo_ids: Tensor | None, batch: int) -> Tensor | None:
    """An order of rows as int64; None: as they are.

    Raises:
        StepError: not (batch,) whole numbers of rows that there are.
    """
    if hypo_ids is None:
        return None
    if tuple(hypo_ids.shape) != (batch,) or hypo_ids.is_floating_point():
        raise StepError(f"hypo_ids must be ({batch},) whole numbers, got {tuple(hypo_ids.shape)} {hypo_ids.dtype}")
    rows = hypo_ids.long()
    if bool((rows < 0).any()) or bool((rows >= batch).any()):
        raise StepError(f"hypo_ids must name rows 0 to {batch - 1}, got {rows.tolist()}")
    same = torch.equal(rows, torch.arange(batch, device=rows.device))
    return None if same else rows
