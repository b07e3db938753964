"""Key/value storage of one session over a range of blocks.

Theory. `transformers` hands a `Cache` to every attention layer, which appends its new keys and values and gets all of
them back. The library's own dynamic cache grows by concatenation, numbers layers from 0 and drops what has left a
sliding window. A server needs three other things, so the storage here is our own:

1. It is allocated once, `max_length` tokens long, because its bytes were leased before the first step.
2. Blocks keep their absolute index in the model, so that any sub-range of a loaded span can have a cache.
3. Sliding-window layers keep every token too. The library then builds their mask over the whole length, which gives
   the same attention, and rolling back is exact however far it goes.

A block may keep other things besides or instead: the keys of an indexer that chooses what attention looks at, which are
treated like keys and values; and states of constant size (states.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from petals.models.blocks.states import Key, Recall, StateShape, recall_bytes, with_new_columns
from petals.models.errors import CacheFull, StepError, UnsupportedModel


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one block keeps, as observed when it ran: heads and head sizes of its keys and values, and what it may
    have besides."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: torch.dtype
    index_dim: int = 0
    """Of an indexer's keys, one per token."""
    states: tuple[StateShape, ...] = ()

    @property
    def keeps_tokens(self) -> bool:
        """Whether there is something for every token."""
        return self.key_heads > 0

    def token_bytes(self) -> int:
        """Bytes of one token of one sequence."""
        numbers = self.key_heads * self.key_dim + self.value_heads * self.value_dim + self.index_dim
        return numbers * self.dtype.itemsize

    def state_bytes(self) -> int:
        """Bytes of one sequence, however long."""
        return sum(state.row_bytes() for state in self.states)


class LayerCache(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What one block keeps: keys and values, (batch, heads, max_length, head_dim), of which the first `length` tokens
    are real; an indexer's keys, (batch, max_length, index_dim); and states, (batch, ...), at position `length`.

    Where keys and values have the same shape, as in all families but a few, they are the halves of `pair`,
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
        self.index_keys: Tensor | None = None
        self.index_length = 0
        if shape.index_dim:
            self.index_keys = torch.empty(batch_size, max_length, shape.index_dim, dtype=shape.dtype, device=device)
        self.states: dict[Key, Tensor] = {
            state.key: torch.zeros(batch_size, *state.shape, dtype=state.dtype, device=device) for state in shape.states
        }
        self.keeps_tokens = shape.keeps_tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the storage exists from the start."""

    def move_to(self, length: int) -> None:
        """The first `length` tokens count from now on."""
        self.length = self.index_length = length

    def state(self, kind: str, number: int) -> Tensor | None:
        """A state to look at or to write into; None: nothing has been seen yet."""
        return self._storage(kind, number) if self.length else None

    def update_columns(self, new: Tensor, number: int) -> Tensor:
        """Add columns (batch, channels, new) to a convolution's state; returns all that the convolution sees."""
        stored = self._storage("conv", number)
        size = stored.shape[-1]
        seen = with_new_columns(stored if self.length else None, new, size)
        stored.copy_(seen[..., -size:])
        return seen

    def update_state(self, new: Tensor, number: int) -> Tensor:
        return self._storage("recurrent", number).copy_(new)

    def _storage(self, kind: str, number: int) -> Tensor:
        try:
            return self.states[kind, number]
        except KeyError:
            raise StepError(f"a block keeps a {kind} state that it did not have when it was loaded") from None

    def update_indexer(self, new: Tensor) -> Tensor:
        """Add an indexer's keys (batch, tokens, index_dim); returns all of them."""
        if self.index_keys is None:
            raise StepError("a block keeps an indexer's keys that it did not have when it was loaded")
        end = self.index_length + new.shape[1]
        self.index_keys[:, self.index_length : end].copy_(new)
        self.index_length = end
        return self.index_keys[:, :end]

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
        if self.index_keys is not None:
            known = self.index_keys[:, : self.length]
            known.copy_(known.index_select(0, beam_idx.to(known.device)))


class _BlockCache(Cache):
    """What the library sees: layers under their absolute index, and one length for all of them."""

    def __init__(self, layers: list[LayerCache], first_block: int) -> None:
        super().__init__(layers=list(layers))
        self._own_layers = layers
        self.first_block = first_block

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        layer = self._at(layer_idx)
        if not layer.keeps_tokens:
            raise StepError(f"block {layer_idx} keeps keys and values that it did not have when it was loaded")
        return layer.update(key_states, value_states)

    def _at(self, layer_idx: int) -> LayerCache:
        layer = layer_idx - self.first_block
        if not 0 <= layer < len(self._own_layers):  # a block that leans on another block's keys and values
            raise StepError(f"block {layer_idx} is outside this session's blocks")
        return self._own_layers[layer]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._at(layer_idx).state("conv", state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object) -> Tensor:
        return self._at(layer_idx).update_columns(conv_states, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._at(layer_idx).state("recurrent", state_idx)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object
    ) -> Tensor:
        return self._at(layer_idx).update_state(recurrent_states, state_idx)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        return self._at(layer_idx).update_indexer(indexer_key_states)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self._own(layer_idx or 0).length > 0

    def is_recording_past(self, layer_idx: int) -> bool:
        return False  # the library's own way to roll back convolutions; states.py has another one

    @property
    def is_linear(self) -> list[bool]:
        return [not layer.keeps_tokens for layer in self._own_layers]

    @property
    def is_dummy(self) -> list[bool]:
        return [False for _ in self._own_layers]

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

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise UnsupportedModel("its blocks remember more than keys and values; such memory cannot be served here")

    get_conv_state: Callable[..., Any] = _refuse
    update_conv_state: Callable[..., Any] = _refuse
    get_recurrent_state: Callable[..., Any] = _refuse
    update_recurrent_state: Callable[..., Any] = _refuse
    has_previous_state: Callable[..., Any] = _refuse
    is_recording_past: Callable[..., Any] = _refuse
    update_indexer: Callable[..., Any] = _refuse


class SpanCache:
    """KV caches of one session: `batch_size` rows of at most `max_length` tokens on each of `blocks`.

    The memory is reserved here; the operating system commits its pages as they are first written.
    """

    def __init__(
        self,
        blocks: range,
        shapes: list[LayerShape],
        batch_size: int,
        max_length: int,
        device: torch.device,
        inputs: tuple[int, torch.dtype] = (0, torch.float32),
    ) -> None:
        """`inputs`: size and dtype of the first block's input for a token."""
        self.blocks = blocks
        self.batch_size = batch_size
        self.max_length = max_length
        self.nbytes = cache_bytes(shapes, batch_size, max_length, inputs)
        self.view: object | None = None
        """The span's private copy of what this session must not share with others (see block.py)."""
        with torch.inference_mode():
            layers = [LayerCache(shape, batch_size, max_length, device) for shape in shapes]
            self._recall: Recall | None = None
            states = [state for layer in layers for state in layer.states.values()]
            if states:
                kept = torch.empty(batch_size, max_length, inputs[0], dtype=inputs[1], device=device)
                self._recall = Recall(states, kept)
        self.library_cache = _BlockCache(layers, blocks.start)
        self._layers = layers
        self._wanted: int | None = None

    @property
    def position(self) -> int:
        """Tokens per row in the cache."""
        return self._layers[0].length if self._wanted is None else self._wanted

    @property
    def lag(self) -> range:
        """Tokens that must run again before the next step, after a roll-back of states (states.py)."""
        return range(self._layers[0].length, self.position)

    def replayed(self, tokens: range) -> tuple[Tensor, Tensor | None]:
        """What the first block was given for these tokens of the lag, and the attention mask up to their end."""
        assert self._recall is not None
        return self._recall.replayed(tokens.start, tokens.stop)

    @property
    def reached(self) -> int:
        """Tokens that all blocks have seen: fewer than `position` while some lag."""
        return self._layers[0].length

    def reach(self, position: int) -> None:
        """All blocks have seen so many tokens, in the middle of a step or a replay."""
        for layer in self._layers:
            layer.move_to(position)

    def begin_step(self) -> None:
        """Before new tokens run, when nothing lags."""
        if self._recall is not None:
            self._recall.keep(self.position)

    def end_step(self, begin: int, hidden: Tensor, mask: Tensor | None, *, prompted: bool = False) -> None:
        """After new tokens ran from `begin` on: (batch, tokens, hidden_size) as they entered the first block."""
        if self._recall is not None:
            self._recall.note(begin, hidden, mask)
            if prompted:
                self._recall.floor = begin + hidden.shape[1]
        self._move_to(begin + hidden.shape[1])

    def end_replay(self, end: int) -> None:
        """After tokens of the lag ran, up to `end`."""
        wanted = self.position
        self._move_to(end)
        self._wanted = None if end == wanted else wanted

    def _move_to(self, position: int) -> None:
        self._wanted = None
        self.reach(position)

    def layer(self, block: int) -> LayerCache:
        """Keys and values of one block."""
        return self._layers[block - self.blocks.start]

    def rollback(self, position: int) -> None:
        """Forget everything from `position` on. Raises StepError if the cache is not that long."""
        if not 0 <= position <= self.position:
            raise StepError(f"cannot roll back to position {position}: the cache holds {self.position} tokens")
        if self._recall is not None and position == self.position:
            return
        if self._recall is not None:
            self._recall.check(position)
        self.truncate(position)

    @torch.inference_mode()
    def truncate(self, position: int) -> None:
        """`rollback` for a step that failed half-way, when blocks hold different numbers of tokens."""
        reached = position if self._recall is None else self._recall.restore(position)
        self._move_to(reached)
        self._wanted = None if reached == position else position

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
            if self._recall is not None:
                self._recall.reorder(hypo_ids.to(self._recall.inputs.device), self.position)

    @torch.inference_mode()
    def copy_from(self, other: SpanCache, tokens: int) -> None:
        """Begin with the first `tokens` tokens of another session of the same model, which has all of our blocks.

        Raises: StepError when it has another batch size, or not that many tokens; CacheFull when we have no room.
        """
        if self._recall is not None:
            raise StepError("sessions of models with recurrent states do not begin with parts of others")
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
            if mine.index_keys is not None and theirs.index_keys is not None:
                mine.index_keys[:, :tokens].copy_(theirs.index_keys[:, :tokens])
        self.truncate(tokens)

    def check_room(self, new_tokens: int) -> None:
        if self.position + new_tokens > self.max_length:
            raise CacheFull(
                f"{new_tokens} more tokens at position {self.position} exceed the session's {self.max_length}; "
                "open it with a larger max_length"
            )


def cache_bytes(
    shapes: list[LayerShape], batch_size: int, max_length: int, inputs: tuple[int, torch.dtype] = (0, torch.float32)
) -> int:
    """Bytes of a cache over blocks of these shapes; `inputs` as for `SpanCache`."""
    tokens = sum(shape.token_bytes() for shape in shapes) * batch_size * max_length
    states = sum(shape.state_bytes() for shape in shapes)
    return tokens + (recall_bytes(states, inputs[0] * inputs[1].itemsize, batch_size, max_length) if states else 0)
