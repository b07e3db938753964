"""Learns what blocks keep by watching one token go through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petals.models.blocks.cache import LayerShape, NoCache
from petals.models.blocks.states import Key, StateShape, with_new_columns


class Recorder(NoCache):
    """A cache that is always empty, and keeps the shapes of what it is given."""

    def __init__(self) -> None:
        self.asked_length = False
        """Whether the stack wanted to know how many tokens came before, to number the new ones."""
        self._tokens: dict[int, tuple[tuple[int, int, int, int], torch.dtype]] = {}
        self._index: dict[int, tuple[int, torch.dtype]] = {}
        self._states: dict[int, dict[Key, StateShape]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        self.asked_length = True
        return 0

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kw: object
    ) -> tuple[Tensor, Tensor]:
        sizes = (keys.shape[1], keys.shape[3], values.shape[1], values.shape[3])
        self._tokens[layer_idx] = sizes, keys.dtype
        return keys, values

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        self._index[layer_idx] = keys.shape[-1], keys.dtype
        return keys

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return False

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    get_recurrent_state = get_conv_state

    def update_conv_state(
        self, columns: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **kw: Any
    ) -> Tensor:
        size = columns.shape[-1] if conv_kernel_size is None else conv_kernel_size
        self._note(layer_idx, ("conv", state_idx), (*columns.shape[1:-1], size), columns.dtype)
        return with_new_columns(None, columns, size)

    def update_recurrent_state(self, state: Tensor, layer_idx: int, state_idx: int = 0, **kw: Any) -> Tensor:
        self._note(layer_idx, ("recurrent", state_idx), tuple(state.shape[1:]), state.dtype)
        return state

    def _note(self, block: int, key: Key, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._states.setdefault(block, {})[key] = StateShape(key, shape, dtype)

    def shape_of(self, block: int) -> LayerShape:
        """What the block keeps; it may be nothing."""
        index, index_dtype = self._index.get(block, (0, torch.float32))
        sizes, dtype = self._tokens.get(block, ((0, 0, 0, 0), index_dtype))
        return LayerShape(*sizes, dtype, index, tuple(self._states.get(block, {}).values()))
