"""What `transformers`' generation code sees of a chain: a cache that keeps nothing, and sessions that outlive a call.

The library's decoding loop asks its cache how long it is, sends only what is new, reorders it after a beam step and
crops it after a rejected draft. All of that has a meaning for a `ChainSession`, whose caches are somewhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from petals.models.blocks.adapters import Lora
from petals.models.client.blockwise import BlockwiseSession
from petals.models.client.chain import BlockChain, ChainSession
from petals.models.errors import StepError
from petals.models.library_contract import CROP_KEEPS, cache_name


class _ChainLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The one layer that the library sees: it stands for the caches of all blocks of the chain.

    A `Cache` asks its layers whatever it is asked itself. One without layers is taken for a recurrent one by
    transformers 5.24 (symptom: the whole text is sent again with every step), so there is exactly one.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, cache: ChainCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._chain_cache = cache
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the servers reserve the room."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise StepError("a block ran at the client with the swarm's cache; its keys and values are at the servers")

    def get_seq_length(self) -> int:
        return self._chain_cache.get_seq_length()

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # transformers before 5.8 passes the positions of the queries
        count = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + count, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._chain_cache.reorder_cache(beam_idx)

    def crop(self, count: int) -> None:
        self._chain_cache.crop(count)

    def reset(self) -> None:
        self._chain_cache.keep(0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise StepError("the rows of a session cannot be multiplied; open it with the larger batch")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise StepError("rows of a session cannot be dropped; open another one")


class ChainCache(Cache):
    """Stands in for a KV cache; opens its session with the first step, when the batch size is known.

    Args:
        max_length: tokens per row to make room for, without the prefix.
        prefix: tokens of a trained prompt in front, which the servers hold and the library must not count.
        lora: low-rank updates trained at home, as they are when the session opens.
    """

    def __init__(self, chain: BlockChain, max_length: int, *, prefix: int = 0, lora: Lora | None = None) -> None:
        super().__init__(layers=[_ChainLayer(self)])
        self.session: ChainSession | None = None
        self._chain = chain
        self._max_length = max_length
        self._prefix = prefix
        self._lora = lora
        self._hypo_ids: Tensor | None = None
        self._counts_prefix = False

    @property
    def held(self) -> int:
        """Tokens per row that the servers hold, a trained prompt included."""
        return 0 if self.session is None else self.session.position

    @contextmanager
    def counting_prefix(self) -> Iterator[None]:
        """While the base model runs it sees the trained prompt like any other tokens."""
        self._counts_prefix = True
        try:
            yield
        finally:
            self._counts_prefix = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.held if self._counts_prefix else max(0, self.held - self._prefix)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from old row beam_idx[i]; sent with the next step."""
        beam_idx = beam_idx.long()  # the library's beam search counts in int32
        self._hypo_ids = beam_idx if self._hypo_ids is None else self._hypo_ids[beam_idx]

    def crop(self, count: int) -> None:
        """The library's roll-back: a negative number drops that many tokens; one that is not negative means what it
        means to the installed version (library_contract.py)."""
        if count < 0:
            self.keep(self.get_seq_length() + count)
        elif CROP_KEEPS:
            self.keep(min(count, self.get_seq_length()))
        elif count > 0:
            raise StepError(f"crop({count}): pass the negative number of tokens to drop")

    def keep(self, tokens: int) -> None:
        """Roll back to the first `tokens` tokens of the text; 0 forgets a trained prompt, too."""
        if self.session is not None and not 0 <= tokens <= self.get_seq_length():
            raise StepError(f"cannot keep {tokens} of {self.get_seq_length()} tokens")
        if self.session is not None:
            self.session.position = tokens + self._prefix if tokens else 0

    def step(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        prompts: Tensor | None = None,
        outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """New tokens through all blocks; shapes as in `ChainSession.step`.

        Args:
            outputs: filled with what every block puts out.
        """
        session = self._open(hidden.shape[0], blockwise=outputs is not None)
        hypo_ids, self._hypo_ids = self._hypo_ids, None
        if hypo_ids is not None and torch.equal(hypo_ids, torch.arange(len(hypo_ids), device=hypo_ids.device)):
            hypo_ids = None
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        hidden = session.step(hidden, attention_mask=attention_mask, prompts=prompts, hypo_ids=hypo_ids)
        if outputs is not None:
            assert isinstance(session, BlockwiseSession)
            outputs += session.outputs
        return hidden

    def _open(self, batch_size: int, *, blockwise: bool) -> ChainSession:
        room = self._max_length + self._prefix
        if self.session is None:
            if blockwise:
                self.session = BlockwiseSession(self._chain, batch_size=batch_size, max_length=room, lora=self._lora)
            else:
                self.session = self._chain.open_session(batch_size=batch_size, max_length=room, lora=self._lora)
        if blockwise and not isinstance(self.session, BlockwiseSession):
            raise StepError("this session began without output_hidden_states: open another one to see hidden states")
        return self.session

    def close(self) -> None:
        """Give the session back."""
        if self.session is not None:
            self.session.close()

    @contextmanager
    def closing(self) -> Iterator[Self]:
        """A context that gives the session back."""
        try:
            yield self
        finally:
            self.close()


class _Inputs(ChainCache):
    """Takes what would enter the first block, and computes nothing."""

    def __init__(self) -> None:
        super().__init__(None, 0)  # type: ignore[arg-type]  # no chain: no session is opened
        self.hidden: Tensor | None = None

    def step(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self.hidden = hidden
        return hidden


def first_block_inputs(model: Any, input_ids: Tensor) -> Tensor:
    """What enters the first block for these tokens, (batch, tokens, hidden_size)."""
    cache = _Inputs()
    with torch.no_grad():
        model.base_model(input_ids=input_ids, use_cache=True, **{cache_name(type(model.base_model).forward): cache})
    assert cache.hidden is not None
    return cache.hidden


class InferenceSession:
    """A session that several `generate` calls, or raw `step` calls, share. A context manager.

    Made by `model.inference_session(max_length=...)`; while its context is open it is the model's active session.
    """

    def __init__(self, cache: ChainCache, max_length: int) -> None:
        self.cache = cache
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
        """Tokens per row in the servers' caches, without a trained prompt. Setting a smaller value rolls back to it."""
        return self.cache.get_seq_length()

    @position.setter
    def position(self, value: int) -> None:
        if not 0 <= value <= self.position:
            raise StepError(f"position {value} is not within the {self.position} tokens of this session")
        self.cache.keep(value)
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
