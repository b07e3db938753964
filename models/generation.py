"""What `transformers`' generation code sees of a chain: a cache that keeps nothing, and sessions that outlive a call.

The library's decoding loop asks its cache how long it is, sends only what is new, reorders it after a beam step and
crops it after a rejected draft. All of that has a meaning for a `ChainSession`, whose caches are somewhere else.
"""

from __future__ import annotations

from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from petals.models.chain import BlockChain, ChainSession
from petals.models.errors import StepError


class ChainCache(Cache):
    """Stands in for a KV cache; opens its session with the first step, when the batch size is known."""

    is_compileable = False

    def __init__(self, chain: BlockChain, max_length: int, session: ChainSession | None = None) -> None:
        super().__init__(layers=[])
        self.session = session
        self._chain = chain
        self._max_length = max_length
        self._hypo_ids: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.session is None else self.session.position

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from old row beam_idx[i]; sent with the next step."""
        beam_idx = beam_idx.long()  # the library's beam search counts in int32
        self._hypo_ids = beam_idx if self._hypo_ids is None else self._hypo_ids[beam_idx]

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens; a negative number drops that many."""
        if self.session is not None:
            self.session.position = max_length if max_length >= 0 else self.session.position + max_length

    def step(self, hidden: Tensor, attention_mask: Tensor | None, prompts: Tensor | None = None) -> Tensor:
        """New tokens through all blocks; shapes as in `ChainSession.step`."""
        if self.session is None:
            self.session = self._chain.open_session(batch_size=hidden.shape[0], max_length=self._max_length)
        hypo_ids, self._hypo_ids = self._hypo_ids, None
        if hypo_ids is not None and torch.equal(hypo_ids, torch.arange(len(hypo_ids), device=hypo_ids.device)):
            hypo_ids = None
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        return self.session.step(hidden, attention_mask=attention_mask, prompts=prompts, hypo_ids=hypo_ids)

    def close(self) -> None:
        """Give the session back."""
        if self.session is not None:
            self.session.close()


class InferenceSession:
    """A session that several `generate` calls, or raw `step` calls, share. A context manager.

    Made by `model.inference_session(max_length=...)`; while its context is open it is the model's active session.
    """

    def __init__(self, chain: BlockChain, max_length: int) -> None:
        self.cache = ChainCache(chain, max_length)
        self.output_ids: Tensor | None = None
        """(batch, tokens) int64: prompt and everything generated so far."""
        self.max_length = max_length
        self._reset: list[Any] = []

    @property
    def last_token_id(self) -> Tensor | None:
        """(batch, 1): the last token generated, which the servers have not seen yet."""
        return None if self.output_ids is None else self.output_ids[:, -1:]

    @property
    def position(self) -> int:
        """Tokens per row in the servers' caches. Setting a smaller value rolls back to it."""
        return self.cache.get_seq_length()

    @position.setter
    def position(self, value: int) -> None:
        if self.cache.session is None:
            if value:
                raise StepError(f"position {value}: the session is empty")
            return
        self.cache.session.position = value
        if self.output_ids is not None:
            self.output_ids = self.output_ids[:, :value] if value else None

    def step(self, hidden: Tensor, *, prompts: Tensor | None = None, hypo_ids: Tensor | None = None) -> Tensor:
        """Raw hidden states (batch, new_tokens, hidden_size) through all blocks."""
        if hypo_ids is not None:
            self.cache.reorder_cache(hypo_ids)
        return self.cache.step(hidden, None, prompts)

    def close(self) -> None:
        """Give the caches back. Idempotent."""
        self.cache.close()

    def __enter__(self) -> Self:
        self._reset.append(active_session.set(self))
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        active_session.reset(self._reset.pop())
        self.close()


active_session: ContextVar[InferenceSession | None] = ContextVar("petals_active_session", default=None)
"""The session of the innermost open `with`, per thread and task."""
