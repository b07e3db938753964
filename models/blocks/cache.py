"""Key/value storage of one session over a range of blocks.

Theory. `transformers` hands a `Cache` to every attention layer, which appends its new keys and values and gets all of
them back. The library's own dynamic cache grows by concatenation, numbers layers from 0 and drops what has left a
sliding window. A server needs three other things, so the storage here is our own:

1. It is allocated once, `max_length` tokens long, because its bytes were leased before the first step.
2. Blocks keep their absolute index in the model, so that any sub-range of a loaded span can have a cache.
3. Sliding-window layers keep every token too. The library then builds their mask over the whole length, which gives
   the same attention, and rolling back is exact however far it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from petals.models.errors import CacheFull, StepError, UnsupportedModel


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Heads and head sizes of one block's keys and values, as observed when the block ran."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: torch.dtype

    def token_bytes(self) -> int:
        """Bytes of one token of one sequence."""
        return (self.key_heads * self.key_dim + self.value_heads * self.value_dim) * self.dtype.itemsize


class LayerCache(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one block: (batch, heads, max_length, head_dim), the first `length` tokens are real.

    Where both have the same shape, as in all families but a few, they are the halves of `pair`,
    (2, batch, heads, max_length, head_dim).
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, shape: LayerShape, batch_size: int, max_length: int, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0
        keys, values = (shape.key_heads, max_length, shape.key_dim), (shape.value_heads, max_length, shape.value_dim)
        self.pair: Tensor | None = None
        if keys == values:
            self.pair = torch.empty(2, batch_size, *keys, dtype=shape.dtype, device=device)
            self.keys, self.values = self.pair.unbind(0)
        else:
            self.keys = torch.empty(batch_size, *keys, dtype=shape.dtype, device=device)
            self.values = torch.empty(batch_size, *values, dtype=shape.dtype, device=device)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the storage exists from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end].copy_(key_states)
        self.values[:, :, self.length : end].copy_(value_states)
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # transformers before 5.8 passes the positions of the queries
        return self.length + (query_length if isinstance(query_length, int) else len(query_length)), 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for buffer in (self.keys, self.values):
            assert buffer is not None
            known = buffer[:, :, : self.length]
            known.copy_(known.index_select(0, beam_idx.to(buffer.device)))


class _BlockCache(Cache):
    """What the library sees: layers under their absolute index, and one length for all of them."""

    def __init__(self, layers: list[LayerCache], first_block: int) -> None:
        super().__init__(layers=list(layers))
        self._own_layers = layers
        self.first_block = first_block

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        layer = layer_idx - self.first_block
        if not 0 <= layer < len(self._own_layers):  # a block that leans on another block's keys and values
            raise StepError(f"block {layer_idx} is outside this session's blocks")
        return self._own_layers[layer].update(key_states, value_states)

    def _own(self, layer_idx: int) -> LayerCache:
        """The layer meant by an index which may be absolute, or 0 for "any"."""
        layer = layer_idx - self.first_block
        return self._own_layers[layer if 0 <= layer < len(self._own_layers) else 0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._own(layer_idx).length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._own(layer_idx).length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self._own(layer_idx).get_mask_sizes(query_length)


class NoCache:
    """What the library takes for a cache: every block starts from an empty past, and nothing is kept."""

    is_compileable = False
    is_sliding: Sequence[bool] = ()
    is_linear: Sequence[bool] = ()
    is_dummy: Sequence[bool] = ()

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kw: object
    ) -> tuple[Tensor, Tensor]:
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return (query_length if isinstance(query_length, int) else len(query_length)), 0

    def _refuse(self, *args: object, **kwargs: object) -> None:
        raise UnsupportedModel("its blocks remember more than keys and values; such memory cannot be served yet")

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = has_previous_state = _refuse


class SpanCache:
    """KV caches of one session: `batch_size` rows of at most `max_length` tokens on each of `blocks`.

    The memory is reserved here; the operating system commits its pages as they are first written.
    """

    def __init__(
        self, blocks: range, shapes: list[LayerShape], batch_size: int, max_length: int, device: torch.device
    ) -> None:
        self.blocks = blocks
        self.batch_size = batch_size
        self.max_length = max_length
        self.nbytes = cache_bytes(shapes, batch_size, max_length)
        self.view: object | None = None
        """The span's private copy of what this session must not share with others (see block.py)."""
        with torch.inference_mode():
            layers = [LayerCache(shape, batch_size, max_length, device) for shape in shapes]
        self.library_cache = _BlockCache(layers, blocks.start)
        self._layers = layers

    @property
    def position(self) -> int:
        """Tokens per row in the cache."""
        return self._layers[0].length

    def layer(self, block: int) -> LayerCache:
        """Keys and values of one block."""
        return self._layers[block - self.blocks.start]

    def rollback(self, position: int) -> None:
        """Forget everything from `position` on. Raises StepError if the cache is not that long."""
        if not 0 <= position <= self.position:
            raise StepError(f"cannot roll back to position {position}: the cache holds {self.position} tokens")
        self.truncate(position)

    def truncate(self, position: int) -> None:
        """`rollback` for a step that failed half-way, when blocks hold different numbers of tokens."""
        for layer in self._layers:
            layer.length = position

    def reorder(self, hypo_ids: Tensor) -> None:
        """Row i becomes old row hypo_ids[i]; (batch,) int64. Raises StepError for ids that are no rows."""
        if tuple(hypo_ids.shape) != (self.batch_size,) or hypo_ids.dtype != torch.int64:
            raise StepError(
                f"hypo_ids must be ({self.batch_size},) int64, not {tuple(hypo_ids.shape)} {hypo_ids.dtype}"
            )
        rows = hypo_ids.tolist()
        if not all(0 <= row < self.batch_size for row in rows):
            raise StepError(f"hypo_ids must name rows 0..{self.batch_size - 1}, got {rows}")
        if rows == list(range(self.batch_size)):
            return
        with torch.inference_mode():
            for layer in self._layers:
                layer.reorder_cache(hypo_ids)

    @torch.inference_mode()
    def copy_from(self, other: SpanCache, tokens: int) -> None:
        """Begin with the first `tokens` tokens of another session of the same model, which has all of our blocks.

        Raises: StepError when it has another batch size, or not that many tokens; CacheFull when we have no room.
        """
        if other.batch_size != self.batch_size or tokens > other.position:
            raise StepError(f"no {tokens} tokens of {self.batch_size} rows to begin with")
        self.truncate(0)
        self.check_room(tokens)
        for block in self.blocks:
            mine, theirs = self.layer(block), other.layer(block)
            for to, source in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                assert to is not None
                assert source is not None
                to[:, :, :tokens].copy_(source[:, :, :tokens])
        self.truncate(tokens)

    def check_room(self, new_tokens: int) -> None:
        if self.position + new_tokens > self.max_length:
            raise CacheFull(
                f"{new_tokens} more tokens at position {self.position} exceed the session's {self.max_length}; "
                "open it with a larger max_length"
            )


def cache_bytes(shapes: list[LayerShape], batch_size: int, max_length: int) -> int:
    """Bytes of a cache over blocks of these shapes."""
    return sum(shape.token_bytes() for shape in shapes) * batch_size * max_length
