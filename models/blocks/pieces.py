"""Whole sequences through blocks, forward and backward, in pieces of bounded time and memory. For training.

Theory. A pass over 16,384 tokens takes minutes on a CPU, and everybody else's decode steps would wait for it. So a pass
is a generator: each `send(units)` computes one piece of about `units` token-blocks (tokens of all rows x blocks), and
whoever drives it lets others compute in between. Rows are independent of each other and blocks follow each other, so
both can be cut anywhere. Tokens of one row can be cut, too:

- Forward, as prompts are: a piece of tokens attends to the keys and values of the pieces before it, in a cache.
- Backward, piece by piece from the last one. With x_i the input of piece i, (k_i, v_i) its keys and values and y_i its
  output, y_i depends on x_i and on (k_j, v_j) of all j <= i, and those on x_j only. So piece i is run again with the
  keys and values before it as leaves; autograd of (y_i, k_i, v_i) with the incoming gradients of y_i, and the gradients
  of (k_i, v_i) collected from later pieces, gives those of x_i, and of all (k_j, v_j), j < i, which are added up.

Backward needs each block's input again. The forward pass before it keeps those, (rows, tokens, hidden_size) for each
block, and as many autograd graphs as fit into `keep_bytes`; what was not kept is computed again, a block at a time.

Rotary embeddings that change with the length of the sequence ("dynamic", "longrope") must see all of it: their rows are
not cut, and a piece is at least one block over one row.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from petals.models.blocks.adapters import Lora
from petals.models.blocks.block import BlockSpan
from petals.models.blocks.cache import NoCache, SpanCache

MIN_TOKENS = 4
"""Of one row, in one piece."""
SCORES_BYTES = 128 << 20
"""Attention scores (rows x heads x new tokens x all tokens, float32) of one piece, where attention is eager."""
BACKWARD_UNITS = 3
"""A piece of backward costs so many of forward: once again, and two products for each one."""

Pieces = Generator[int, int, None]
"""Yields how many units a piece took, is sent how many the next one may take."""


@dataclass(slots=True)
class Sequences:
    """What goes through `blocks`.

    Args:
        hidden: (batch, tokens, hidden_size), on the CPU, in the span's dtype.
        attention_mask: (batch, tokens), 0 for padding; None: there is none.
        prompts: (len(blocks), batch, prefix, hidden_size), added to the first positions of each block's input.
        adapter: the name of a hosted one, or a client's own.
    """

    blocks: range
    hidden: Tensor
    attention_mask: Tensor | None = None
    prompts: Tensor | None = None
    adapter: str | Lora | None = None

    def rows(self, rows: slice) -> Sequences:
        """Some rows of the batch."""
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        prompts = None if self.prompts is None else self.prompts[:, rows]
        return Sequences(self.blocks, self.hidden[rows], mask, prompts, self.adapter)

    def prompts_of(self, blocks: range) -> Tensor | None:
        """Those of a sub-range of the blocks."""
        first = self.blocks.start
        return None if self.prompts is None else self.prompts[blocks.start - first : blocks.stop - first]

    def adapter_of(self, blocks: range) -> str | Lora | None:
        """The part that concerns a sub-range of the blocks."""
        return self.adapter.of(blocks) if isinstance(self.adapter, Lora) else self.adapter

    @property
    def factors(self) -> list[Tensor]:
        """Of a client's own adapter."""
        return self.adapter.factors() if isinstance(self.adapter, Lora) else []


def forward_bytes(span: BlockSpan, batch: int, tokens: int) -> int:
    """Memory that `ForwardPass` takes besides its input and one piece: its output, two states of a group of rows, and
    one block's keys and values."""
    state = batch * tokens * span.hidden_size * span.dtype.itemsize
    return 3 * state + _kv_bytes(span, tokens)


def backward_bytes(span: BlockSpan, blocks: range, batch: int, tokens: int, keep_bytes: int) -> int:
    """The same of `BackwardPass`, with the graphs that it keeps."""
    state = batch * tokens * span.hidden_size * span.dtype.itemsize
    return (len(blocks) + 3) * state + 3 * _kv_bytes(span, tokens) + keep_bytes


def _kv_bytes(span: BlockSpan, tokens: int) -> int:
    return max(span.cache_bytes(range(block, block + 1), 1, tokens) for block in span.blocks)


class ForwardPass:
    """All rows through all blocks; `output` (batch, tokens, hidden_size) is complete when `pieces` has ended."""

    def __init__(self, span: BlockSpan, given: Sequences) -> None:
        self._span, self._given = span, given
        self.output = torch.empty_like(given.hidden, requires_grad=False)

    def pieces(self, units: int) -> Pieces:
        """The work; errors as of `BlockSpan.forward`."""
        first, batch, tokens = 0, *self._given.hidden.shape[:2]
        while first < batch:
            rows = slice(first, first + _rows(self._span, self._given, units))
            group = self._given.rows(rows)
            state, blocks = group.hidden, group.blocks
            while blocks:
                count = _whole_blocks(self._span, units, *state.shape[:2])
                if count:
                    here = blocks[:count]
                    with torch.inference_mode():
                        state = _whole(self._span, group, here, state)
                    units = yield here_units(state, here)
                else:
                    here = blocks[:1]
                    cache = self._span.new_cache(here, state.shape[0], tokens)
                    state, units = yield from _in_chunks(self._span, group, state, cache, units)
                blocks = blocks[len(here) :]
            with torch.inference_mode():
                self.output[rows] = state
            first += state.shape[0]


@dataclass(slots=True)
class _Segment:
    """Some blocks, what goes into them, and the graph over them if it was kept."""

    blocks: range
    inputs: Tensor
    leaves: list[Tensor] = field(default_factory=list)
    output: Tensor | None = None


class BackwardPass:
    """Gradients of all that went into the blocks, given that of their output.

    Attributes, complete when `pieces` has ended:
        hidden: (batch, tokens, hidden_size). prompts: as given, or None.
        factors: of A and B of each layer of a client's own adapter, in order.
    """

    def __init__(self, span: BlockSpan, given: Sequences, grad_output: Tensor, keep_bytes: int) -> None:
        """
        Args:
            grad_output: shape of `given.hidden`.
            keep_bytes: most bytes of graphs to keep from the forward pass to the backward pass.
        """
        self._span, self._given, self._grad = span, given, grad_output
        self._keep_bytes, self._kept_per_unit = keep_bytes, 0.0
        self.hidden = torch.empty_like(given.hidden, requires_grad=False)
        self.prompts = None if given.prompts is None else torch.zeros_like(given.prompts, requires_grad=False)
        self.factors = [torch.zeros_like(factor, requires_grad=False) for factor in given.factors]
        self._places = {id(factor): index for index, factor in enumerate(given.factors)}
        for factor in given.factors:
            factor.requires_grad_()

    def pieces(self, units: int) -> Pieces:
        """The work; errors as of `BlockSpan.forward`."""
        first, batch = 0, self._given.hidden.shape[0]
        while first < batch:
            rows = slice(first, first + _rows(self._span, self._given, units // BACKWARD_UNITS))
            group = self._given.rows(rows)
            segments: list[_Segment] = []
            units = yield from self._forward(group, segments, units)
            grad = self._grad[rows].to(group.hidden.dtype)
            while segments:
                grad, units = yield from self._back(group, rows, segments, grad, units)
            self.hidden[rows] = grad
            first += grad.shape[0]

    def _forward(self, group: Sequences, segments: list[_Segment], units: int) -> Generator[int, int, int]:
        """Fill `segments`; returns the units of the next piece. The last block's output is of no use, unless its graph
        is kept."""
        state, blocks, left = group.hidden, group.blocks, self._keep_bytes
        while blocks:
            count = _whole_blocks(self._span, units // BACKWARD_UNITS, *state.shape[:2])
            fitting = int(left // (self._kept_per_unit * state.shape[0] * state.shape[1])) if self._kept_per_unit else 1
            here = blocks[: max(1, min(count, fitting))]
            segment = _Segment(here, state)
            segments.append(segment)
            if count and fitting and left > 0:
                saved = _Saved()
                with saved.counting():
                    self._run(group, segment)
                self._kept_per_unit = max(self._kept_per_unit, saved.nbytes / here_units(state, here))
                assert segment.output is not None
                state = segment.output.detach()
                left -= saved.nbytes
                if left < 0 and len(here) == 1:
                    segment.output, segment.leaves = None, []
                units = yield here_units(state, here)
            elif len(blocks) == 1:
                return units
            elif count:
                with torch.no_grad():
                    state = _whole(self._span, group, here, state)
                units = yield here_units(state, here)
            else:
                cache = self._span.new_cache(here, *state.shape[:2])
                state, units = yield from _in_chunks(self._span, group, state, cache, units)
            blocks = blocks[len(here) :]
        return units

    def _run(self, group: Sequences, segment: _Segment) -> None:
        """Run a segment with a graph."""
        blocks = segment.blocks
        prompts, adapter = group.prompts_of(blocks), group.adapter_of(blocks)
        segment.inputs = segment.inputs.detach().requires_grad_()
        segment.leaves = [segment.inputs]
        if prompts is not None:
            prompts = prompts.detach().requires_grad_()
            segment.leaves.append(prompts)
        if isinstance(adapter, Lora):
            segment.leaves += adapter.factors()
        with torch.enable_grad():
            segment.output = self._span.forward(
                segment.inputs, blocks, attention_mask=group.attention_mask, prompts=prompts, adapter=adapter
            )

    def _back(
        self, group: Sequences, rows: slice, segments: list[_Segment], grad: Tensor, units: int
    ) -> Generator[int, int, tuple[Tensor, int]]:
        """Through the last segment; the gradient of its input, and the units of the next piece."""
        segment = segments.pop()
        if segment.output is None and not _whole_blocks(self._span, units // BACKWARD_UNITS, *grad.shape[:2]):
            return (yield from self._back_in_chunks(group, rows, segment, grad, units))
        if segment.output is None:
            self._run(group, segment)
        assert segment.output is not None
        # A token may pass an expert by, and its factors with it: unused, which is a gradient of zero.
        given = torch.autograd.grad(segment.output, segment.leaves, grad, allow_unused=True, materialize_grads=True)
        segment.output = None
        place = segment.blocks.start - group.blocks.start
        rest = given[1:]
        if self.prompts is not None:
            self.prompts[place : place + len(segment.blocks), rows] = given[1]
            rest = given[2:]
        self._add_factors(group, segment.blocks, rest)
        units = yield here_units(grad, segment.blocks) * BACKWARD_UNITS
        return given[0], units

    def _back_in_chunks(
        self, group: Sequences, rows: slice, segment: _Segment, grad: Tensor, units: int
    ) -> Generator[int, int, tuple[Tensor, int]]:
        """Through one block, some tokens of its rows at a time (see the theory above)."""
        block, adapter = segment.blocks.start, group.adapter_of(segment.blocks)
        inputs, mask = _prompted(group, segment.blocks, segment.inputs.detach()), group.attention_mask
        batch, end, _ = inputs.shape
        cache = self._span.new_cache(segment.blocks, batch, end)
        _, units = yield from _in_chunks(self._span, group, segment.inputs, cache, units)
        layer = cache.layer(block)
        assert layer.keys is not None
        assert layer.values is not None
        grad_keys, grad_values = torch.zeros_like(layer.keys), torch.zeros_like(layer.values)
        grad_inputs = torch.empty_like(inputs)
        factors = adapter.factors() if isinstance(adapter, Lora) else []
        while end:
            start = max(0, end - _chunk(self._span, units // BACKWARD_UNITS, batch, end))
            piece = inputs[:, start:end].clone().requires_grad_()
            past = _Past(layer.keys[:, :, :start].clone(), layer.values[:, :, :start].clone())
            with torch.enable_grad():
                output = self._span.extend(
                    piece,
                    segment.blocks,
                    past,
                    attention_mask=None if mask is None else mask[:, :end],
                    adapter=adapter,
                )
            outputs = [output, past.new_keys, past.new_values]
            incoming = [grad[:, start:end], grad_keys[:, :, start:end], grad_values[:, :, start:end]]
            leaves = [piece, *([past.keys, past.values] if start else []), *factors]
            given = torch.autograd.grad(outputs, leaves, incoming, allow_unused=True, materialize_grads=True)
            grad_inputs[:, start:end] = given[0]
            if start:
                grad_keys[:, :, :start] += given[1]
                grad_values[:, :, :start] += given[2]
            self._add_factors(group, segment.blocks, given[len(leaves) - len(factors) :])
            units = yield batch * (end - start) * BACKWARD_UNITS
            end = start
        if self.prompts is not None:
            prefix = self.prompts.shape[2]
            self.prompts[block - group.blocks.start, rows] = grad_inputs[:, :prefix].to(self.prompts.dtype)
        return grad_inputs, units

    def _add_factors(self, group: Sequences, blocks: range, grads: tuple[Tensor, ...]) -> None:
        adapter = group.adapter_of(blocks)
        factors = adapter.factors() if isinstance(adapter, Lora) else []
        for factor, grad in zip(factors, grads, strict=True):
            self.factors[self._places[id(factor)]] += grad


def here_units(state: Tensor, blocks: range) -> int:
    """Units of all of `state` through `blocks`."""
    return state.shape[0] * state.shape[1] * len(blocks)


def _rows(span: BlockSpan, given: Sequences, units: int) -> int:
    """How many rows go through one block in a piece."""
    batch, tokens, _ = given.hidden.shape
    if given.attention_mask is not None and not span.cache_depends_on_tokens_only:
        return batch  # their rotary embeddings depend on the longest row
    return max(1, min(units // tokens, SCORES_BYTES // (4 * span.heads * tokens * tokens)))


def _whole_blocks(span: BlockSpan, units: int, rows: int, tokens: int) -> int:
    """Through how many blocks whole rows go in a piece; 0: not even through one, their tokens are cut."""
    if not span.cuts_tokens:
        return max(1, units // (rows * tokens))
    if tokens > MIN_TOKENS and 4 * span.heads * rows * tokens * tokens > SCORES_BYTES:
        return 0
    return max(units // (rows * tokens), int(tokens <= MIN_TOKENS))


def _chunk(span: BlockSpan, units: int, rows: int, tokens: int) -> int:
    """How many tokens of each row go through one block in a piece, of `tokens` that they attend to."""
    return max(1, MIN_TOKENS // rows, min(units // rows, SCORES_BYTES // (4 * span.heads * rows * tokens)))


def _whole(span: BlockSpan, group: Sequences, blocks: range, state: Tensor) -> Tensor:
    return span.forward(
        state,
        blocks,
        attention_mask=group.attention_mask,
        prompts=group.prompts_of(blocks),
        adapter=group.adapter_of(blocks),
    )


def _in_chunks(
    span: BlockSpan, group: Sequences, state: Tensor, cache: SpanCache, units: int
) -> Generator[int, int, tuple[Tensor, int]]:
    """All tokens through the cache's one block, which holds their keys and values then. The output, and the units of
    the next piece."""
    state = _prompted(group, cache.blocks, state.detach())
    batch, tokens, _ = state.shape
    adapter, mask = group.adapter_of(cache.blocks), group.attention_mask
    output, start = torch.empty_like(state), 0
    while start < tokens:
        end = min(tokens, start + _chunk(span, units, batch, tokens))
        output[:, start:end] = span.step(
            state[:, start:end], cache, attention_mask=None if mask is None else mask[:, :end], adapter=adapter
        )
        units = yield batch * (end - start)
        start = end
    return output, units


def _prompted(group: Sequences, blocks: range, state: Tensor) -> Tensor:
    """The input of one block with its prompt added; no graph."""
    prompts = group.prompts_of(blocks)
    if prompts is None:
        return state
    prefix = prompts.shape[2]
    state = state.clone()
    state[:, :prefix] += prompts[0].detach().to(state.dtype)
    return state


class _Past(NoCache):
    """Keys and values before a piece, as leaves of its graph; and those of the piece, once it has run."""

    new_keys: Tensor
    new_values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys.requires_grad_(), values.requires_grad_()

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kw: object
    ) -> tuple[Tensor, Tensor]:
        self.new_keys, self.new_values = keys, values
        if not self.keys.shape[2]:
            return keys, values
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.keys.shape[2]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.keys.shape[2]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.keys.shape[2] + query_length, 0


class _Saved:
    """Counts the bytes that a graph keeps, parameters left out."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._seen: set[int] = set()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.nbytes += storage.nbytes()
        return tensor.detach()  # itself would be a cycle of references, where it is an output

    def counting(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
