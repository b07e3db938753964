"""All blocks at home: the exact answer that every remote chain is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from petals.models.blocks.adapters import Lora
from petals.models.blocks.block import BlockSpan
from petals.models.blocks.cache import SpanCache
from petals.models.errors import BlockRangeError, StepError


class LocalChain:
    """A `BlockChain` over one or several loaded spans that follow one another."""

    def __init__(self, spans: BlockSpan | Sequence[BlockSpan], *, blocks: range | None = None) -> None:
        """Chain `spans`; `blocks` picks a sub-range. Raises BlockRangeError when the spans leave a gap or overlap."""
        spans = (spans,) if isinstance(spans, BlockSpan) else tuple(spans)
        if not spans:
            raise BlockRangeError("a chain needs at least one span")
        for left, right in pairwise(spans):
            if left.blocks.stop != right.blocks.start:
                raise BlockRangeError(
                    f"a span ends at block {left.blocks.stop}, the next begins at {right.blocks.start}"
                )
        loaded = range(spans[0].blocks.start, spans[-1].blocks.stop)
        self._blocks = loaded if blocks is None else blocks
        if not loaded.start <= self._blocks.start < self._blocks.stop <= loaded.stop or self._blocks.step != 1:
            raise BlockRangeError(
                f"blocks {self._blocks.start}:{self._blocks.stop} are not within {loaded.start}:{loaded.stop}"
            )
        self._hops = [
            (span, part)
            for span in spans
            if len(part := range(max(span.blocks.start, self._blocks.start), min(span.blocks.stop, self._blocks.stop)))
        ]
        self._spans = spans

    @property
    def blocks(self) -> range:
        return self._blocks

    @property
    def hidden_size(self) -> int:
        return self._spans[0].hidden_size

    @property
    def dtype(self) -> torch.dtype:
        return self._spans[0].dtype

    def open_session(self, *, batch_size: int, max_length: int, lora: Lora | None = None) -> LocalSession:
        return LocalSession(self._hops, self._blocks, batch_size, max_length, lora)

    def forward(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None = None,
        prompts: Tensor | None = None,
        lora: Lora | None = None,
    ) -> Tensor:
        for span, part in self._hops:
            hidden = span.forward(
                hidden,
                part,
                attention_mask=attention_mask,
                prompts=_prompts_of(prompts, part, self._blocks),
                adapter=None if lora is None else lora.of(part),
            )
        return hidden

    def slice(self, blocks: range) -> LocalChain:
        outside = blocks.start < self._blocks.start or blocks.stop > self._blocks.stop
        if outside:
            raise BlockRangeError(
                f"blocks {blocks.start}:{blocks.stop} are not within {self._blocks.start}:{self._blocks.stop}"
            )
        return LocalChain(self._spans, blocks=blocks)


class LocalSession:
    """A `ChainSession` over local spans."""

    def __init__(
        self,
        hops: list[tuple[BlockSpan, range]],
        blocks: range,
        batch_size: int,
        max_length: int,
        lora: Lora | None = None,
    ) -> None:
        self._blocks = blocks
        self._batch_size = batch_size
        self._max_length = max_length
        self._lora = lora
        self._hops: list[tuple[BlockSpan, SpanCache]] = [
            (span, span.new_cache(part, batch_size, max_length)) for span, part in hops
        ]

    @property
    def blocks(self) -> range:
        return self._blocks

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def position(self) -> int:
        return self._open_hops()[-1][1].position

    @position.setter
    def position(self, value: int) -> None:
        for _, cache in self._open_hops():
            cache.rollback(value)

    def step(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None = None,
        prompts: Tensor | None = None,
        hypo_ids: Tensor | None = None,
    ) -> Tensor:
        for span, cache in self._open_hops():
            hidden = span.step(
                hidden,
                cache,
                attention_mask=attention_mask,
                prompts=_prompts_of(prompts, cache.blocks, self._blocks),
                hypo_ids=hypo_ids,
                adapter=None if self._lora is None else self._lora.of(cache.blocks),
            )
        # Born in inference mode, a tensor could never enter autograd, not even as the input of a trainable head.
        return hidden.clone()

    def close(self) -> None:
        self._hops = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _open_hops(self) -> list[tuple[BlockSpan, SpanCache]]:
        if not self._hops:
            raise StepError("the session is closed")
        return self._hops


def _prompts_of(prompts: Tensor | None, part: range, blocks: range) -> Tensor | None:
    """The prompts of `part` out of those of all `blocks`. Raises StepError when there is not one per block."""
    if prompts is None:
        return None
    if prompts.shape[0] != len(blocks):
        raise StepError(f"prompts must have one entry for each of {len(blocks)} blocks, got {prompts.shape[0]}")
    return prompts[part.start - blocks.start : part.stop - blocks.start]
