"""The cache that a distributed model returns when it was given none, as `transformers`' own models do.

Theory. `past = model(ids).past_key_values; model(next_ids, past_key_values=past)` says nothing of how long the text
will get, while servers reserve room in advance; and most calls of a model never use what they return. So nothing is
opened until a second step comes, unless the caller asked for a cache: the first step is computed without one and its
inputs are remembered. When a session is needed, or a longer one, it is opened with twice the room and is given the
inputs again, in one step. The inputs are hidden states in front of the first block: some kilobytes a token.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from petals.models.blocks.adapters import Lora
from petals.models.client.blockwise import BlockwiseSession
from petals.models.client.chain import BlockChain, ChainSession
from petals.models.client.generation import ChainCache
from petals.models.errors import StepError

SHORTEST = 64
"""Tokens per row of the first session."""


class GrowingCache(ChainCache):
    """A `ChainCache` without a limit of its own, that may be copied, and whose rows may be picked.

    Args:
        eager: open a session with the first step already, where that needs no gradients.
    """

    def __init__(self, chain: BlockChain, *, prefix: int = 0, lora: Lora | None = None, eager: bool = False) -> None:
        super().__init__(chain, 0, prefix=prefix, lora=lora)
        self._eager = eager
        self._inputs: list[Tensor] = []
        self._prompts: Tensor | None = None

    @property
    def held(self) -> int:
        return sum(part.shape[1] for part in self._inputs)

    @property
    def rows(self) -> int:
        return self._inputs[0].shape[0] if self._inputs else 1

    def begin(self, prefix: int, lora: Lora | None) -> None:
        if not self._inputs:
            self._prefix, self._lora = prefix, lora

    def begins_without_session(self, *tensors: Tensor | None) -> bool:
        factors = () if self._lora is None else self._lora.factors()
        wants_grad = any(each is not None and each.requires_grad for each in (*tensors, *factors))
        return not self._inputs and (not self._eager or (torch.is_grad_enabled() and wants_grad))

    def remember(self, hidden: Tensor, attention_mask: Tensor | None, prompts: Tensor | None) -> None:
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        self._inputs.append(hidden.detach())
        self._mask = None if attention_mask is None else attention_mask.detach().bool()
        self._prompts = self._prompts if prompts is None else prompts.detach()

    def step(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        prompts: Tensor | None = None,
        outputs: list[Tensor] | None = None,
    ) -> Tensor:
        output = super().step(hidden, attention_mask, prompts, outputs)
        self.remember(hidden, attention_mask, prompts)
        return output

    def _open(self, batch_size: int, new_tokens: int, *, blockwise: bool) -> ChainSession:
        if self._closed:
            raise StepError("the session is closed")
        if self._inputs and batch_size != self.rows:
            raise StepError(f"hidden has {batch_size} rows, the cache {self.rows}")
        session, needed = self.session, self.held + new_tokens
        if session is None or needed > session.max_length or (blockwise and not isinstance(session, BlockwiseSession)):
            self._drop_session()
            self.session = session = self._new_session(batch_size, max(SHORTEST, 2 * needed), blockwise=blockwise)
            self._hypo_ids = None  # the inputs are in the new order already
            if self._inputs:
                inputs = torch.cat(self._inputs, dim=1)
                session.step(inputs, attention_mask=self._mask, prompts=self._prompts)
        return session

    def _drop_session(self) -> None:
        if self.session is not None:
            self.session.close()
        self.session = None

    def keep(self, tokens: int) -> None:
        if not 0 <= tokens <= self.get_seq_length():
            raise StepError(f"cannot keep {tokens} of {self.get_seq_length()} tokens")
        left = tokens + self._prefix if tokens else 0
        if self.session is not None:
            self.session.position = left
        self._inputs = [torch.cat(self._inputs, dim=1)[:, :left]] if left else []
        self._prompts = self._prompts if left else None
        self._cut_mask()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._inputs = [part[beam_idx.long().to(part.device)] for part in self._inputs]

    def pick_rows(self, rows: Tensor) -> None:
        """Go on with these rows, as many as there are; another session is opened for them."""
        self._drop_session()
        self._hypo_ids = None
        self._inputs = [part[rows.to(part.device)] for part in self._inputs]
        self._mask = None if self._mask is None else self._mask[rows.to(self._mask.device)]
        self._prompts = None if self._prompts is None else self._prompts[:, rows.to(self._prompts.device)]

    def restart(self) -> None:
        super().restart()
        self._inputs, self._prompts = [], None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same text, to be continued differently; its session is opened when that happens."""
        twin = type(self)(self._chain, prefix=self._prefix, lora=self._lora, eager=self._eager)
        twin._inputs, twin._mask, twin._prompts = list(self._inputs), self._mask, self._prompts
        return twin
