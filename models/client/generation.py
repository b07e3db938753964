"""What `transformers`' generation code sees of a chain: a cache that keeps nothing, and sessions that outlive a call.

The library's decoding loop asks its cache how long it is, sends only what is new, reorders it after a beam step and
crops it after a rejected draft. All of that has a meaning for a `ChainSession`, whose caches are somewhere else.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from petals.models.blocks.adapters import Lora
from petals.models.client.active_sessions import ActiveSessions
from petals.models.client.blockwise import BlockwiseSession
from petals.models.client.chain import BlockChain, ChainSession
from petals.models.client.step_inputs import checked_hidden, checked_prompts, checked_rows
from petals.models.errors import CacheFull, StepError
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
        rows = torch.arange(self._chain_cache.rows).repeat_interleave(repeats)
        self._chain_cache.pick_rows(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._chain_cache.pick_rows(indices)


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
        self._mask: Tensor | None = None
        """(batch, held) bool: what the servers hold without padding; None: all of it."""
        self._counts_prefix = False
        self._closed = False

    @property
    def chain(self) -> BlockChain:
        return self._chain

    @property
    def rows(self) -> int:
        """Rows of the open session; 1 if there is none."""
        return 1 if self.session is None else self.session.batch_size

    def begin(self, prefix: int, lora: Lora | None) -> None:
        """What a model puts in front of the text, and its updates; only the first step may say so."""
        if self.session is None:
            self._prefix, self._lora = prefix, lora

    def pick_rows(self, rows: Tensor) -> None:
        """Go on with these rows, as many as there are. Raises StepError: the servers' rows are fixed."""
        raise StepError("the rows of a session are fixed; open another one for another batch")

    def begins_without_session(self, *tensors: Tensor | None) -> bool:
        """Whether a step is computed by `BlockChain.forward`, and only remembered here; see growing_cache.py."""
        return False

    def remember(self, hidden: Tensor, attention_mask: Tensor | None, prompts: Tensor | None) -> None:
        """Note a step that was computed without a session."""
        raise NotImplementedError

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

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.held > 0  # what stacks with recurrent blocks ask

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from old row beam_idx[i]; sent with the next step."""
        beam_idx = beam_idx.long()  # the library's beam search counts in int32
        self._hypo_ids = beam_idx if self._hypo_ids is None else self._hypo_ids[beam_idx]
        if self._mask is not None:
            self._mask = self._mask[beam_idx.to(self._mask.device)]

    def text_mask(self, rows: int, tokens: int) -> Tensor:
        """What of the first `tokens` tokens is real as the servers were told, (rows, tokens) int64.

        Args:
            rows: of the text; where the servers' rows are beams, as many of each.
        """
        mask = torch.ones(rows, tokens, dtype=torch.long)
        if self._mask is not None:
            known = self._mask[:: max(1, len(self._mask) // rows), self._prefix :][:, :tokens]
            mask[:, : known.shape[1]] = known
        return mask

    def full_mask(self, mask: Tensor, new_tokens: int) -> Tensor:
        """A mask over all tokens of the text, from one that may cover the new ones only.

        Args:
            mask: (batch, new tokens) or (batch, all tokens), 1 = a real token.
        Raises:
            StepError: any other length.
        """
        known = self.get_seq_length()
        if mask.dim() != 2 or mask.shape[1] not in (new_tokens, known + new_tokens):
            raise StepError(
                f"attention_mask must cover the {new_tokens} new tokens or all {known + new_tokens}, "
                f"got {tuple(mask.shape)}"
            )
        if mask.shape[1] == known + new_tokens:
            return mask
        before = mask.new_ones(mask.shape[0], known) if self._mask is None else self._mask[:, self._prefix :].to(mask)
        return torch.cat([before, mask], dim=1)

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
            self._cut_mask()

    def _cut_mask(self) -> None:
        if self._mask is not None:
            self._mask = self._mask[:, : self.held] if self.held else None

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
        Raises:
            StepError: a tensor that does not fit. CacheFull: there is no room for so many tokens.
        """
        checked_hidden(hidden, self._chain.hidden_size)
        prompts = checked_prompts(prompts, hidden, len(self._chain.blocks))
        session = self._open(hidden.shape[0], hidden.shape[1], blockwise=outputs is not None)
        if hidden.shape[0] != session.batch_size:
            raise StepError(f"hidden has {hidden.shape[0]} rows, the session {session.batch_size}: open another one")
        if session.position + hidden.shape[1] > session.max_length:
            raise CacheFull(
                f"{session.position} + {hidden.shape[1]} tokens do not fit into the session's max_length of "
                f"{session.max_length}"
            )
        if not hidden.shape[1]:  # opened, which is all that a step of nothing can do
            return hidden
        hypo_ids, self._hypo_ids = checked_rows(self._hypo_ids, session.batch_size), None
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        hidden = session.step(hidden, attention_mask=attention_mask, prompts=prompts, hypo_ids=hypo_ids)
        self._mask = None if attention_mask is None else attention_mask.detach().bool()
        if outputs is not None:
            assert isinstance(session, BlockwiseSession)
            outputs += session.outputs
        return hidden

    def _open(self, batch_size: int, new_tokens: int, *, blockwise: bool) -> ChainSession:
        if self._closed:
            raise StepError("the session is closed")
        if self.session is None:
            self.session = self._new_session(batch_size, self._max_length + self._prefix, blockwise=blockwise)
        if blockwise and not isinstance(self.session, BlockwiseSession):
            raise StepError("this session began without output_hidden_states: open another one to see hidden states")
        return self.session

    def _new_session(self, batch_size: int, room: int, *, blockwise: bool) -> ChainSession:
        session: ChainSession
        if blockwise:
            session = BlockwiseSession(self._chain, batch_size=batch_size, max_length=room, lora=self._lora)
        else:
            session = self._chain.open_session(batch_size=batch_size, max_length=room, lora=self._lora)
        # Whoever drops the cache without closing it must not keep the servers' room.
        weakref.finalize(self, _let_go, session).atexit = False
        return session

    def reserve(self, batch_size: int) -> None:
        """Open the session now."""
        self._open(batch_size, 0, blockwise=False)

    def restart(self) -> None:
        """Forget everything: the next step opens another session, with as many rows as it brings."""
        if self.session is not None:
            self.session.close()
        self.session, self._hypo_ids, self._mask = None, None, None

    def close(self) -> None:
        """Give the session back. Idempotent."""
        self._closed = True
        if self.session is not None:
            self.session.close()

    @contextmanager
    def closing(self) -> Iterator[Self]:
        """A context that gives the session back."""
        try:
            yield self
        finally:
            self.close()


def _let_go(session: ChainSession) -> None:
    abandon = getattr(session, "abandon", session.close)
    abandon()


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
    """A session that several `generate` calls, calls of the model or of its blocks, or raw `step` calls share.

    A context manager, made by `model.inference_session(max_length=...)` or by that of a stack of blocks; while its
    context is open it is the active session of that stack. Servers reserve room with the first step, when the number
    of rows is known.
    """

    def __init__(self, cache: ChainCache, max_length: int, active: ActiveSessions | None = None) -> None:
        """`active`: where it is entered; None: it is only passed on by hand."""
        self.cache = cache
        self.output_ids: Tensor | None = None
        """(batch, tokens) int64: prompt and everything generated so far."""
        self.max_length = max_length
        self.active = active
        self.beams = False
        """Whether the servers' rows are beams, of which `output_ids` has the best."""
        self.unknown_from: int | None = None
        """From which position on hidden states were stepped whose tokens nobody knows."""
        self._parts: dict[tuple[int, int], ChainCache] = {}
        self._entered: list[AbstractContextManager[Any]] = []

    @property
    def blocks(self) -> range:
        """Half-open, absolute."""
        return self.cache.chain.blocks

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def last_token_id(self) -> Tensor | None:
        """(batch, 1): the last token generated, which the servers have not seen yet."""
        return None if self.output_ids is None else self.output_ids[:, -1:]

    @property
    def position(self) -> int:
        """Tokens per row in the servers' caches, without a trained prompt. Setting a smaller value rolls back to it.

        Where slices were stepped one by one: of the slice that is furthest.
        """
        return max(cache.get_seq_length() for cache in self._caches())

    @position.setter
    def position(self, value: int) -> None:
        if not 0 <= value <= self.position:
            raise StepError(f"position {value} is not within the {self.position} tokens of this session")
        for cache in self._caches():
            cache.keep(min(value, cache.get_seq_length()))
        if self.output_ids is not None:
            self.output_ids = self.output_ids[:, :value] if value else None
        if self.unknown_from is not None and value <= self.unknown_from:
            self.unknown_from = None

    def _caches(self) -> list[ChainCache]:
        return [self.cache, *self._parts.values()]

    def cache_of(self, blocks: range) -> ChainCache:
        """What a slice of this session's blocks continues: a cache of its own, opened with its first step.

        Raises:
            StepError: some of these blocks were stepped within another slice, or all of them together.
        """
        key = blocks.start, blocks.stop
        whole = blocks == self.blocks
        for cache in self._caches():
            other = cache.chain.blocks
            if other != blocks and cache.held and max(other.start, blocks.start) < min(other.stop, blocks.stop):
                raise StepError(
                    f"this session has stepped blocks {other.start}:{other.stop} together, so blocks {key[0]}:{key[1]} "
                    "have no cache of their own: use the same slices at every step"
                )
        if whole:
            return self.cache
        if key not in self._parts:
            self._parts[key] = ChainCache(self.cache.chain.slice(blocks), self.max_length)
        return self._parts[key]

    def step(
        self,
        inputs: Tensor,
        prompts: Tensor | None = None,
        hypo_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        blocks: range | None = None,
    ) -> Tensor:
        """Raw hidden states (batch, new_tokens, hidden_size) through all blocks, or a slice of them.

        Args:
            prompts: as of `ChainSession.step`; those of one row are for all rows.
            hypo_ids: (batch,) int64; before the step, row i becomes old row hypo_ids[i].
            attention_mask: over the new tokens or over all of them; None: all real.
            blocks: absolute; None: all of the session's.
        Raises:
            StepError: a tensor that does not fit. CacheFull: more tokens than `max_length`.
        """
        cache = self.cache_of(self.blocks if blocks is None else blocks)
        before = self.position
        checked_hidden(inputs, cache.chain.hidden_size)
        if hypo_ids is not None:
            cache.reorder_cache(hypo_ids)
        if attention_mask is not None:
            attention_mask = cache.full_mask(attention_mask, inputs.shape[1])
        output = cache.step(inputs, attention_mask, prompts)
        if self.unknown_from is None and inputs.shape[1]:
            self.unknown_from = before
        return output

    def note_tokens(self, input_ids: Tensor | None, position: int) -> None:
        """The model has stepped these tokens, (batch, tokens), at `position`; None: it was given embeddings."""
        if input_ids is None:
            self.unknown_from = position if self.unknown_from is None else self.unknown_from
            return
        before = self.output_ids[:, :position] if self.output_ids is not None and position else input_ids[:, :0]
        self.output_ids = torch.cat([before.to(input_ids), input_ids], dim=1)

    def close(self) -> None:
        """Give the caches back. Idempotent."""
        for cache in self._caches():
            cache.close()

    def __enter__(self) -> Self:
        if self.active is not None:
            entered = self.active.use(self)
            entered.__enter__()
            self._entered.append(entered)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._entered:
            self._entered.pop().__exit__(None, None, None)
        self.close()
