"""Blocks of the fewest operations in which all that a session can get wrong still shows: which tokens came before, of
which row, at which positions, through which blocks. Everything around them is real: the span, its caches, attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from petals.models.blocks.block import BlockSpan
from petals.models.blocks.cache import LayerCache
from petals.models.blocks.lean import Lean, _attend, _hidden, _remember
from petals.models.blocks.passes import Part
from petals.models.kernels.small_matmul import Product

LENGTH = 128


class _PlainBlock:
    products: Sequence[Product] = ()

    def __init__(self, block: int, heads: int, key_heads: int, size: int) -> None:
        assert heads == 2 * key_heads  # what comes in, cut into keys and values
        self._heads, self._pair, self._size = heads, (2, key_heads, size), size
        self._weight = torch.randn(heads * size, generator=torch.Generator().manual_seed(block))

    def __call__(self, x: Tensor, around: Tensor, parts: Sequence[Part], caches: Sequence[LayerCache]) -> Tensor:
        (part,), (cache,) = parts, caches  # nobody shares a pass
        x = torch.addcmul(around, x, self._weight)
        keys, values = _remember(x.view(-1, *self._pair).transpose(0, 1), cache, part)
        queries = x.view(-1, self._heads, self._size)
        return x.add_(_attend(queries, keys, values, part, 1.0, _hidden(part, x))).tanh_()


class _PlainFamily:
    max_length = LENGTH

    def __init__(self, blocks: list[Any], hidden_size: int) -> None:
        self.blocks = blocks
        self._places = torch.randn(LENGTH, hidden_size, generator=torch.Generator().manual_seed(1 << 20))

    def around(self, x: Tensor, parts: Sequence[Part]) -> Tensor:
        """What is added to each row for its position: (rows, hidden_size)."""
        (part,) = parts
        return self._places.narrow(0, part.position, part.tokens).repeat(part.batch, 1)


def make_plain(span: BlockSpan) -> BlockSpan:
    """`span`, loaded from a tiny checkpoint, with plain blocks in place of its own; the shapes stay."""
    config = span._model.config
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    blocks = [_PlainBlock(block, heads, key_heads, config.hidden_size // heads) for block in span.blocks]
    span._lean = Lean(_PlainFamily(blocks, config.hidden_size), span.blocks, measured=False)
    return span
