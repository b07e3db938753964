"""One step of one session as work for the lane, alone or together with others' steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Self

import outcome
import torch
from torch import Tensor

from petals.models.blocks.block import BlockSpan
from petals.models.blocks.cache import SpanCache
from petals.peer.engine.scheduler import SharedWork
from petals.peer.engine.stream_rules import Adapter

log = logging.getLogger(__name__)
MAX_REASONS = 16
"""So many different failures of shared passes are logged, in the whole life of the process."""


class StepWork(SharedWork):
    """New tokens of one session; runs in the compute thread."""

    def __init__(
        self, span: BlockSpan, cache: SpanCache, position: int, tensors: Mapping[str, Tensor], adapter: Adapter
    ) -> None:
        """
        Args:
            position: where the tokens go; what the cache holds from there on is forgotten.
            tensors: "hidden" (batch, tokens, hidden_size), and where they are used "attention_mask", "prompts" and
                "hypo_ids", as `BlockSpan.step` takes them.
        """
        self._span = span
        self._cache = cache
        self._position = position
        self._tensors = tensors
        self._adapter = adapter
        hidden = tensors["hidden"]
        self._hidden = hidden if hidden.dtype is span.dtype else hidden.to(span.dtype)

    @property
    def rows(self) -> int:
        return self._hidden.shape[0] * self._hidden.shape[1]

    @property
    def can_join(self) -> bool:
        """Whether it needs nothing that a shared pass has not."""
        mask = self._tensors.get("attention_mask")
        plain = "prompts" not in self._tensors
        return plain and self._span.can_join(self._hidden, self._cache, mask, self._adapter)

    def __call__(self) -> Tensor:
        return self.alone()

    def alone(self) -> Tensor:
        """The step by itself, which takes everything."""
        self._rollback()
        others = ("attention_mask", "prompts", "hypo_ids")
        extras: dict[str, Any] = {name: self._tensors[name] for name in others if name in self._tensors}
        return self._span.step(self._hidden, self._cache, adapter=self._adapter, **extras)

    @classmethod
    def together(cls, works: Sequence[Self]) -> list[outcome.Outcome[Any]]:
        ready = [outcome.capture(work._get_ready) for work in works]
        fit = [work for work, result in zip(works, ready, strict=True) if isinstance(result, outcome.Value)]
        span = works[0]._span
        try:
            done = iter(
                span.step_together(
                    [work._hidden for work in fit],
                    [work._cache for work in fit],
                    [work._tensors.get("attention_mask") for work in fit],
                    [work._adapter for work in fit],
                )
                if fit
                else ()
            )
        except Exception as error:  # whose fault it is shows when each is alone
            _report(error, len(fit))
            return [outcome.capture(work) for work in works]
        return [outcome.Value(next(done)) if isinstance(result, outcome.Value) else result for result in ready]

    def _get_ready(self) -> None:
        """All that may fail for this session alone. It may be done twice."""
        self._rollback()
        self._cache.check_room(self._hidden.shape[1])
        hypo_ids = self._tensors.get("hypo_ids")
        if hypo_ids is not None:
            self._cache.reorder(hypo_ids)
            self._tensors = {name: tensor for name, tensor in self._tensors.items() if name != "hypo_ids"}

    def _rollback(self) -> None:
        if self._position < self._cache.position:
            self._cache.rollback(self._position)


_reported: set[str] = set()


def _report(error: Exception, steps: int) -> None:
    """Log why a shared pass failed, each reason once: from then on it costs every step twice the time."""
    reason = f"{type(error).__name__}: {error}"
    if reason not in _reported and len(_reported) < MAX_REASONS:
        _reported.add(reason)
        log.warning("a pass of %d steps failed and is run again, step by step: %s", steps, reason, exc_info=error)


def whole(outputs: Sequence[Tensor]) -> Tensor:
    """The pieces of one step, put together."""
    if len(outputs) == 1:
        return outputs[0]
    with torch.inference_mode():
        return torch.cat(tuple(outputs), dim=1)
