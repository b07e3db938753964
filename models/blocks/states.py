"""Memory of constant size: what blocks with linear attention, state spaces or short convolutions keep of the past.

Theory. Keys and values are a list with one entry per token, so a cache of them is rolled back by forgetting its end. A
recurrent state is a sum over all tokens: nothing can be taken out of it again. Sessions are rolled back all the same -
a draft is rejected, a step fails half-way, a user edits the text - so a session over such blocks keeps two things more:

1. Snapshots of its states at the starts of the last `SNAPSHOTS` steps. A rejected step goes back to one of them.
2. The inputs of its first block, one hidden state per token. A position between two snapshots is reached from the
   nearest earlier one, or from nothing, by running the tokens in between once more. That happens with the next step,
   in the thread that computes.

So a roll-back is exact to wherever it goes, and all of its memory is of a size that is known, and leased, before the
first step. Beams reorder states, snapshots and inputs alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from petals.models.errors import StepError

SNAPSHOTS = 2
"""At most, of one session. Each is as large as the states."""
REPLAY_TOKENS = 256
"""Run again in one piece after a roll-back."""
MASK_BYTES = 8
"""Of one token of one row in an attention mask."""

Key = tuple[str, int]
"""Kind of a state ("conv", "recurrent") and its number: a block may have several of a kind."""


@dataclass(frozen=True, slots=True)
class StateShape:
    """One state of one block, as observed when the block ran."""

    key: Key
    shape: tuple[int, ...]
    """Of one row."""
    dtype: torch.dtype

    def row_bytes(self) -> int:
        """Bytes of one sequence's state, whatever its length."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def with_new_columns(state: Tensor | None, new: Tensor, size: int) -> Tensor:
    """What a causal convolution sees: the columns kept and the new ones, (batch, channels, columns).

    state: (batch, channels, size), or None at the beginning, when zeros make up for columns that are missing.
    """
    if state is not None:
        return torch.cat([state, new], dim=-1)
    return torch.nn.functional.pad(new, (max(0, size - new.shape[-1]), 0))


@dataclass(slots=True)
class _Snapshot:
    position: int
    states: list[Tensor]


@dataclass(slots=True)
class Recall:
    """What a session needs to roll back states; bytes as `recall_bytes` counts them."""

    states: list[Tensor]
    """Those of all blocks, (batch, ...): the blocks write into them."""
    inputs: Tensor
    """(batch, max_length, hidden_size): of the first block."""
    mask: Tensor | None = None
    """(batch, tokens) of the last step; None: nothing is padding."""
    floor: int = 0
    """Positions between 0 and this one cannot be reached: the first step had deep prompts, which are not kept."""
    _snapshots: list[_Snapshot] = field(default_factory=list)

    def keep(self, position: int) -> None:
        """Before a step from `position`: take a snapshot. The beginning needs none."""
        if position == 0 or any(each.position == position for each in self._snapshots):
            return
        pinned = [each for each in self._snapshots if each.position == self.floor and self.floor]
        others = [each for each in self._snapshots if each not in pinned]
        while len(pinned) + len(others) >= SNAPSHOTS and others:
            others.pop(0)
        self._snapshots = [*pinned, *others, _Snapshot(position, [state.clone() for state in self.states])]

    def note(self, begin: int, hidden: Tensor, mask: Tensor | None) -> None:
        """After a step: remember what went in, (batch, tokens, hidden_size) and the mask for all tokens so far."""
        end = begin + hidden.shape[1]
        self.inputs[:, begin:end].copy_(hidden)
        if mask is None and self.mask is not None:  # state spaces' clients do not repeat what padding was
            mask = torch.nn.functional.pad(self.mask[:, :begin], (0, end - begin), value=1)
        self.mask = mask

    def check(self, position: int) -> None:
        """Raise StepError for a position that cannot be reached."""
        if 0 < position < self.floor:
            raise StepError(
                f"cannot roll back to position {position}: this session began with deep prompts; "
                f"go back to 0, or to {self.floor} or later"
            )

    def restore(self, position: int) -> int:
        """Set the states to those of the nearest snapshot that is not behind `position`; returns where it was taken."""
        self._snapshots = [each for each in self._snapshots if each.position <= position]
        if position < self.floor:
            self.floor = 0
        if not self._snapshots:
            return 0  # blocks do not look at states at position 0
        nearest = self._snapshots[-1]
        for state, kept in zip(self.states, nearest.states, strict=True):
            state.copy_(kept)
        return nearest.position

    def reorder(self, rows: Tensor, position: int) -> None:
        """Row i becomes old row rows[i]."""
        for state in _all(self.states, self._snapshots):
            state.copy_(state.index_select(0, rows))
        known = self.inputs[:, :position]
        known.copy_(known.index_select(0, rows))
        if self.mask is not None:
            self.mask = self.mask.index_select(0, rows)

    def replayed(self, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Inputs of these tokens, and the mask up to `end`."""
        return self.inputs[:, begin:end], None if self.mask is None else self.mask[:, :end]


def _all(states: Iterable[Tensor], snapshots: Iterable[_Snapshot]) -> list[Tensor]:
    return [*states, *(state for snapshot in snapshots for state in snapshot.states)]


def recall_bytes(state_bytes: int, token_bytes: int, batch_size: int, max_length: int) -> int:
    """Bytes of states, snapshots, inputs and mask of a session.

    Args:
        state_bytes: of all states of one row. token_bytes: of one hidden state.
    """
    states = (1 + SNAPSHOTS) * state_bytes * batch_size
    return states + (token_bytes + MASK_BYTES) * batch_size * max_length
