"""A loaded span of consecutive blocks: the unit a server computes with.

The span is the family's own base model with everything but the blocks taken out (loading.py does that), so attention
masks, rotary positions and alibi are built by the library's own code. Blocks keep their absolute index. A session may
use any sub-range of a span: it runs on a *view*, a shallow copy of the base model whose list holds only those blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from petals.models.blocks.adapters import Applied, Lora, LoraHook, check_lora, linear_features, linear_layers
from petals.models.blocks.cache import LayerShape, NoCache, SpanCache, cache_bytes
from petals.models.blocks.joint import Joint
from petals.models.blocks.lean import Lean, lean_path
from petals.models.blocks.model_views import (
    device_of,
    get_layers,
    has_stateful_rope,
    own_tensors,
    shorten,
    with_own_rope,
)
from petals.models.blocks.passes import NewTokens
from petals.models.blocks.prompts import PromptHook
from petals.models.blocks.recorder import Recorder
from petals.models.blocks.states import REPLAY_TOKENS
from petals.models.errors import BlockRangeError, StepError, UnsupportedModel
from petals.models.kernels.float16_weights import HalfLinear
from petals.models.kernels.packed_layers import PackedExperts, PackedLinear
from petals.models.library_contract import cache_name, takes

_KEPT = (HalfLinear, PackedLinear, PackedExperts)
"""Modules whose matrices are no parameters."""


class BlockSpan:
    """Consecutive blocks of one model, ready to compute; weights are frozen.

    Several threads may run different sessions at once; a session belongs to one thread at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        blocks: range,
        *,
        quant_type: str,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """`model` is a base model whose list of blocks at `path` holds exactly `blocks`, all on `device`."""
        self.blocks = blocks
        self.dtype = dtype
        self.quant_type = quant_type
        text = model.config.get_text_config(decoder=True)
        self.hidden_size: int = text.hidden_size
        self.heads: int = getattr(text, "num_attention_heads", 1)  # state spaces have none
        self._model = model
        self._path = path
        self._layers = list(get_layers(model, path))
        self.device = device_of(self._layers[0], torch.device(device))
        self._applied = Applied()
        self._adapters: dict[str, Lora] = {}
        self._linear_features: dict[int, dict[str, tuple[int, int]]] = {}
        self._takes_lora = False
        self._views: dict[range, PreTrainedModel] = {}
        self._takes_positions = takes(type(model).forward, "position_ids")
        self._cache_name = cache_name(type(model).forward)
        self._stateful_rope = has_stateful_rope(model)
        for index, layer in zip(blocks, self._layers, strict=True):
            layer.register_forward_pre_hook(PromptHook(self._applied, index), with_kwargs=True)
        self._shapes: list[LayerShape] = []
        self._one_by_one = False
        self._numbers_tokens = False
        """Whether the stack must be told positions: Bamba's counts from 0 in every step."""
        self._lean: Lean | None = None
        self._joint: Joint | None = None

    @property
    def lean(self) -> bool:
        """Whether steps of few rows go the lean way (lean.py)."""
        return self._lean is not None

    @property
    def joins(self) -> bool:
        """Whether steps of different sessions can share a pass: the lean way, or through the library's own layers
        (joint.py)."""
        return self._lean is not None or self._joint is not None

    @property
    def cache_depends_on_tokens_only(self) -> bool:
        """Whether a prefix of one session's cache may be the beginning of another's: not where rotary embeddings
        change with the length of the whole sequence."""
        return not self._stateful_rope and not self.keeps_states

    @property
    def cuts_tokens(self) -> bool:
        """Whether a training pass may run some tokens of a row behind others (pieces.py), whose keys and values are all
        that it needs."""
        return self.cache_depends_on_tokens_only and not any(shape.index_dim for shape in self._shapes)

    @property
    def keeps_states(self) -> bool:
        """Whether blocks keep states of constant size (states.py): their sessions share no passes and no prefixes."""
        return any(shape.states or not shape.keeps_tokens for shape in self._shapes)

    def find_lean_path(self, *, measured: bool) -> None:
        """Go the lean way from now on, if there is one for these blocks. Before the first session."""
        if not self._stateful_rope and not self.keeps_states:
            self._lean = lean_path(self._model, self._path, self._layers, self.blocks, measured=measured)

    def find_joint_path(self) -> None:
        """Let sessions share passes through the library's own layers from now on (joint.py): where there is no lean
        way, and with adapters. Before the first session."""
        self._joint = Joint(
            self._model,
            self._path,
            self.blocks,
            self._applied,
            takes_positions=self._takes_positions,
            own_ropes=self._stateful_rope,
        )

    def calibrate(self) -> None:
        """Measure what is chosen by measurement; about a second."""
        if self._lean is not None:
            self._lean.calibrate()

    @contextmanager
    def library_path(self, *, shared: bool = False) -> Iterator[None]:
        """While open, steps go through the library's layers; `shared`: in passes that sessions share, if they can, each
        session alone otherwise. For comparison: no other thread may run."""
        faster = self._lean, self._joint
        self._lean, self._joint = None, self._joint if shared else None
        try:
            yield
        finally:
            self._lean, self._joint = faster

    def drop_lean_path(self) -> None:
        """Go the library's way for good."""
        self._lean = None

    def drop_joint_path(self) -> None:
        """Share no passes through the library's layers."""
        self._joint = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers of the blocks, and of what stands for them."""
        tensors = [t for layer in self._layers for t in (*layer.parameters(), *layer.buffers())]
        others = [module for layer in self._layers for module in layer.modules() if isinstance(module, _KEPT)]
        return sum(t.nbytes for t in tensors) + sum(module.weight_bytes for module in others)

    def layers(self, blocks: range | None = None) -> list[nn.Module]:
        """The library's own modules of these blocks."""
        blocks = self._check_blocks(self.blocks if blocks is None else blocks)
        return self._layers[blocks.start - self.blocks.start : blocks.stop - self.blocks.start]

    def linear_features(self, block: int) -> dict[str, tuple[int, int]]:
        """(in, out) of every linear layer of a block, by its path; looked up for every step with an adapter."""
        if block not in self._linear_features:
            self._linear_features[block] = linear_features(self.layers(range(block, block + 1))[0])
        return self._linear_features[block]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the hosted adapters."""
        return tuple(self._adapters)

    def add_adapter(self, lora: Lora) -> None:
        """Host an adapter; requests choose it by its name. Raises StepError when it does not fit the span."""
        check_lora(lora, self)
        self._take_lora()
        self._adapters[lora.name] = lora

    def _take_lora(self) -> None:
        """Let linear layers look for an adapter; spans that never see one are spared the look."""
        if self._takes_lora:
            return
        self._takes_lora = True
        for index, layer in zip(self.blocks, self._layers, strict=True):
            for path, linear in linear_layers(layer).items():
                linear.register_forward_hook(LoraHook(self._applied, index, path))

    def _find_lora(self, adapter: str | Lora | None) -> Lora | None:
        if isinstance(adapter, Lora):
            check_lora(adapter, self)
            self._take_lora()
            return adapter
        if adapter is not None and adapter not in self._adapters:
            raise StepError(f"no adapter {adapter!r} here; hosted are: {', '.join(self._adapters) or 'none'}")
        return None if adapter is None else self._adapters[adapter]

    def measure_shapes(self) -> None:
        """Learn the shape of every block's keys and values by running one token through the span."""
        recorder = Recorder()
        before = own_tensors(self._layers)
        hidden = torch.zeros(1, 1, self.hidden_size, dtype=self.dtype, device=self.device)
        with torch.inference_mode():
            self._run(self._view(self.blocks), hidden, recorder, None)
        strange = sorted(own_tensors(self._layers).keys() - before.keys())
        if strange:  # sessions would share it
            raise UnsupportedModel(f"its blocks keep what they remember in themselves ({strange[0]}), not in a cache")
        self._shapes = [recorder.shape_of(block) for block in self.blocks]
        self._numbers_tokens = self._takes_positions and not recorder.asked_length
        self._one_by_one = self.keeps_states and not self._continues()

    @torch.inference_mode()
    def _continues(self) -> bool:
        """Whether several tokens at once go on from a state. Some blocks of transformers begin anew then (Mamba 1's and
        Jamba's in 5.23); they get one token at a time."""
        generator = torch.Generator().manual_seed(4)
        hidden = torch.randn(2, 6, self.hidden_size, generator=generator).to(self.device, self.dtype)
        cache = self.new_cache(self.blocks, 2, 6)
        steps = torch.cat([self.step(hidden[:, :3], cache), self.step(hidden[:, 3:], cache)], 1)
        whole = self.forward(hidden, self.blocks)
        limit = (1e-3 if self.dtype == torch.float32 else 2e-2) * whole.abs().max()
        return bool(((steps - whole).abs() <= limit).all())

    def cache_bytes(self, blocks: range, batch_size: int, max_length: int) -> int:
        """Bytes that `new_cache` with the same arguments reserves."""
        return cache_bytes(self._shapes_of(blocks), batch_size, max_length, (self.hidden_size, self.dtype))

    def new_cache(self, blocks: range, batch_size: int, max_length: int) -> SpanCache:
        """Reserve a session's caches over `blocks`, a sub-range of the span.

        Raises: BlockRangeError, and StepError for a size that is not positive.
        """
        if batch_size < 1 or max_length < 1:
            raise StepError(f"a session needs batch_size and max_length of at least 1, got {batch_size}, {max_length}")
        shapes, inputs = self._shapes_of(blocks), (self.hidden_size, self.dtype)
        cache = SpanCache(blocks, shapes, batch_size, max_length, self.device, inputs)
        cache.view = self._view(blocks, private=self._stateful_rope)
        return cache

    @torch.inference_mode()
    def step(
        self,
        hidden: Tensor,
        cache: SpanCache,
        *,
        attention_mask: Tensor | None = None,
        prompts: Tensor | None = None,
        hypo_ids: Tensor | None = None,
        adapter: str | Lora | None = None,
    ) -> Tensor:
        """Run new tokens through the cache's blocks and extend it; shapes as in `ChainSession.step`.

        `adapter`: the name of a hosted one, or a client's own; it should stay the same for a session.
        Raises: StepError when a tensor does not fit (nothing changed), CacheFull when there is no room. Should the
        computation itself fail, the position is as before, but rows may have been reordered: end the session.
        """
        self._check_step(hidden, cache)
        lora = self._find_lora(adapter)
        mask = self._checked_mask(attention_mask, hidden.shape[0], cache.position + hidden.shape[1])
        if prompts is not None:
            self._check_prompts(prompts, cache.blocks, hidden)
            if cache.position != 0:
                raise StepError(f"prompts are only taken by the step at position 0, this is {cache.position}")
        if hypo_ids is not None:
            cache.reorder(hypo_ids)
        assert isinstance(cache.view, PreTrainedModel)
        if self._lean is not None and prompts is None and lora is None and self.can_join(hidden, cache, mask):
            return self._run_together([self._new_tokens(hidden, cache, mask)])[0].to(hidden)
        self._catch_up(cache, lora)
        position = cache.position
        cache.begin_step()
        try:
            with self._applying(lora, prompts, cache.blocks):
                output = self._run_cached(cache, hidden, mask)
            cache.end_step(position, hidden, mask, prompted=prompts is not None)
            return output
        except BaseException:  # blocks before the failing one have already appended their keys and values
            cache.truncate(position)
            raise

    def _catch_up(self, cache: SpanCache, lora: Lora | None) -> None:
        """Run again what a roll-back of states left out."""
        while lag := cache.lag:
            tokens = lag[:REPLAY_TOKENS]
            hidden, mask = cache.replayed(tokens)
            with self._applying(lora, None, cache.blocks):
                self._run_cached(cache, hidden, mask)
            cache.end_replay(tokens.stop)

    def _run_cached(self, cache: SpanCache, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """New tokens through the cache's blocks, in one piece where they allow it."""
        assert isinstance(cache.view, PreTrainedModel)
        begin, count = cache.reached, hidden.shape[1]
        if not self._one_by_one or begin == 0 or count == 1:
            return self._run(cache.view, hidden, cache.library_cache, mask)
        outputs = []
        for at in range(count):
            known = None if mask is None else mask[:, : begin + at + 1]
            outputs.append(self._run(cache.view, hidden[:, at : at + 1], cache.library_cache, known))
            cache.reach(begin + at + 1)
        return torch.cat(outputs, 1)

    def can_join(
        self,
        hidden: Tensor,
        cache: SpanCache,
        attention_mask: Tensor | None = None,
        adapter: str | Lora | None = None,
    ) -> bool:
        """Whether a step of just these tokens, none of them padding and nothing prompted, may be part of
        `step_together`.

        `attention_mask`: as `step` takes it; how long it is is not looked at.
        """
        batch, tokens, _ = hidden.shape
        path = self._joint if adapter is not None else self._lean or self._joint
        if path is None or not path.takes(batch, tokens, cache.position):
            return False
        return attention_mask is None or bool(attention_mask[:, -tokens:].all())

    @torch.inference_mode()
    def step_together(
        self,
        hidden: Sequence[Tensor],
        caches: Sequence[SpanCache],
        attention_masks: Sequence[Tensor | None] | None = None,
        adapters: Sequence[str | Lora | None] | None = None,
    ) -> list[Tensor]:
        """`step` for several sessions in one pass; each must be one that `can_join` allows, and all different.

        Where there is a lean way, those with adapters have a pass of their own.

        Raises: StepError, CacheFull, as `step`; nothing has changed then.
        """
        nothing = [None] * len(caches)
        sessions = []
        columns = hidden, caches, attention_masks or nothing, adapters or nothing
        for rows, cache, given, adapter in zip(*columns, strict=True):
            self._check_step(rows, cache)
            mask = self._checked_mask(given, rows.shape[0], cache.position + rows.shape[1])
            sessions.append(self._new_tokens(rows, cache, mask, self._find_lora(adapter)))
        return [output.to(rows) for output, rows in zip(self._run_together(sessions), hidden, strict=True)]

    def _new_tokens(self, hidden: Tensor, cache: SpanCache, mask: Tensor | None, lora: Lora | None = None) -> NewTokens:
        return NewTokens(hidden.to(device=self.device, dtype=self.dtype), cache, mask, lora)

    def _run_together(self, sessions: Sequence[NewTokens]) -> list[Tensor]:
        """The sessions' outputs in the span's dtype, on its device."""
        lean = [i for i, session in enumerate(sessions) if self._lean is not None and session.lora is None]
        joint = [i for i, session in enumerate(sessions) if self._lean is None or session.lora is not None]
        positions = [session.cache.position for session in sessions]
        outputs: dict[int, Tensor] = {}
        try:
            for path, chosen in ((self._lean, lean), (self._joint, joint)):
                if chosen:
                    assert path is not None
                    outputs.update(zip(chosen, path.run([sessions[i] for i in chosen]), strict=True))
        except BaseException:  # as in `step`; and the first of two passes may be done
            for session, position in zip(sessions, positions, strict=True):
                session.cache.truncate(position)
            raise
        return [outputs[i] for i in range(len(sessions))]

    def _check_step(self, hidden: Tensor, cache: SpanCache) -> None:
        self._check_hidden(hidden)
        if hidden.shape[0] != cache.batch_size:
            raise StepError(f"hidden has {hidden.shape[0]} rows, the session {cache.batch_size}")
        cache.check_room(hidden.shape[1])

    def forward(
        self,
        hidden: Tensor,
        blocks: range,
        *,
        attention_mask: Tensor | None = None,
        prompts: Tensor | None = None,
        adapter: str | Lora | None = None,
    ) -> Tensor:
        """Blocks without cache; shapes as in `BlockChain`.

        Differentiable with respect to `hidden`, `prompts` and the factors of a client's own `adapter`.

        Raises: BlockRangeError, StepError.
        """
        self._check_hidden(hidden)
        mask = self._checked_mask(attention_mask, hidden.shape[0], hidden.shape[1])
        if prompts is not None:
            self._check_prompts(prompts, blocks, hidden)
        lora = self._find_lora(adapter)
        view = self._view(blocks, private=self._stateful_rope)
        with self._applying(lora, prompts, blocks):
            return self._run(view, hidden, None, mask)

    def extend(
        self,
        hidden: Tensor,
        blocks: range,
        cache: NoCache,
        *,
        attention_mask: Tensor | None = None,
        adapter: str | Lora | None = None,
    ) -> Tensor:
        """New tokens behind a past of the caller's own (`cache`), differentiable as `forward` is.

        Args:
            hidden: (batch, tokens, hidden_size). attention_mask: (batch, past + tokens).
        Raises: BlockRangeError, StepError.
        """
        self._check_hidden(hidden)
        mask = self._checked_mask(attention_mask, hidden.shape[0], cache.get_seq_length() + hidden.shape[1])
        with self._applying(self._find_lora(adapter), None, blocks):
            return self._run(self._view(blocks), hidden, cache, mask)

    def _run(self, view: PreTrainedModel, hidden: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
        """One pass of a view; dtype and device of `hidden` come back."""
        inputs = hidden.to(device=self.device, dtype=self.dtype)
        extra: dict[str, Tensor] = {}
        if mask is not None:
            extra["attention_mask"] = mask
            if self._takes_positions:
                extra["position_ids"] = position_ids(mask)[:, -hidden.shape[1] :]
        elif self._numbers_tokens and cache is not None:
            begin = cache.get_seq_length()
            extra["position_ids"] = torch.arange(begin, begin + hidden.shape[1], device=self.device)[None]
        output = view(inputs_embeds=inputs, use_cache=cache is not None, **{self._cache_name: cache}, **extra)
        last: Tensor = output.last_hidden_state
        return last.to(device=hidden.device, dtype=hidden.dtype)

    def _view(self, blocks: range, *, private: bool = False) -> PreTrainedModel:
        """The base model over a sub-range. Private: with rotary embeddings of its own.

        "dynamic" and "longrope" rotary embeddings remember how long the last sequence was; shared between sessions
        they would give one session the frequencies of another.
        """
        self._check_blocks(blocks)
        view = self._views.get(blocks)
        if view is None:
            view = self._views[blocks] = shorten(self._model, self._path, self.blocks, blocks)
        return with_own_rope(view) if private else view

    def _shapes_of(self, blocks: range) -> list[LayerShape]:
        self._check_blocks(blocks)
        return self._shapes[blocks.start - self.blocks.start : blocks.stop - self.blocks.start]

    def _check_blocks(self, blocks: range) -> range:
        inside = self.blocks.start <= blocks.start < blocks.stop <= self.blocks.stop
        if not inside or blocks.step != 1:
            raise BlockRangeError(
                f"blocks {blocks.start}:{blocks.stop} are not within the loaded {self.blocks.start}:{self.blocks.stop}"
            )
        return blocks

    def _check_hidden(self, hidden: Tensor) -> None:
        if hidden.ndim != 3 or hidden.shape[2] != self.hidden_size or 0 in hidden.shape:
            raise StepError(f"hidden must be (batch, tokens, {self.hidden_size}), got {tuple(hidden.shape)}")
        if not hidden.is_floating_point():
            raise StepError(f"hidden must be floating, got {hidden.dtype}")

    def _checked_mask(self, mask: Tensor | None, batch_size: int, length: int) -> Tensor | None:
        """The mask as int64 on the span's device; None when it hides nothing, which is the library's fast path."""
        if mask is None:
            return None
        if tuple(mask.shape) != (batch_size, length):
            raise StepError(f"attention_mask must be ({batch_size}, {length}), got {tuple(mask.shape)}")
        if mask.is_floating_point():
            raise StepError(f"attention_mask must be integer or bool, got {mask.dtype}")
        mask = (mask != 0).to(device=self.device, dtype=torch.int64)
        return None if bool(mask.all()) else mask

    def _check_prompts(self, prompts: Tensor, blocks: range, hidden: Tensor) -> None:
        batch, tokens, size = hidden.shape
        fits = prompts.ndim == 4 and tuple(prompts.shape[:2]) == (len(blocks), batch) and prompts.shape[3] == size
        if not fits or prompts.shape[2] > tokens:
            raise StepError(
                f"prompts must be ({len(blocks)}, {batch}, at most {tokens}, {size}), got {tuple(prompts.shape)}"
            )

    @contextmanager
    def _applying(self, lora: Lora | None, prompts: Tensor | None, blocks: range) -> Iterator[None]:
        """While open, this thread's runs use the adapter and add prompts[i] to the input of blocks[i]."""
        if prompts is not None:
            prompts = prompts.to(device=self.device, dtype=self.dtype)
            self._applied.prompts = dict(zip(blocks, prompts, strict=True))
        self._applied.lora = lora
        try:
            yield
        finally:
            self._applied.lora = self._applied.prompts = None


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions of all tokens of a padded batch, as `transformers.generate` counts them: (batch, length) int64."""
    return (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
