"""Generation over sessions: what a distributed language model has beyond the family's own class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from petals.models.client.chain import BlockChain
from petals.models.client.client_check import check_client
from petals.models.client.distributed import DistributedMixin, build_client, head_class_of, load_model
from petals.models.client.generation import ChainCache, InferenceSession
from petals.models.errors import CacheFull, StepError
from petals.models.families import base_class_of
from petals.models.library_contract import DEFAULT_CACHE_NAME, STATES_NAME, cache_name, pop_cache
from petals.models.source.checkpoint import Checkpoint
from petals.models.source.loading import find_layers

DEFAULT_NEW_TOKENS = 20
"""What `transformers.generate` adds to a text when nothing says how long it may get (its documentation)."""


class GenerationMixin(DistributedMixin):
    """`generate` as `transformers` has it, over the caches of the swarm."""

    def generate(
        self, inputs: Tensor | None = None, *args: Any, session: InferenceSession | None = None, **kwargs: Any
    ) -> Any:
        """`transformers`' own `generate`. With a session: `inputs` are the tokens that are new, and so are the results.

        Raises:
            StepError: nothing to go on with. What a chain raises: MissingBlocks, RemoteError.
        """
        inputs = kwargs.pop("input_ids", inputs)
        given = pop_cache(kwargs)
        if given is not None and session is not None:
            raise StepError("give a session or a cache, not both")
        if given is not None:
            return super().generate(inputs, *args, **{self._cache_name: given}, **kwargs)  # type: ignore[misc]
        session = session or self.active_session
        if session is not None:
            return self._generate_in(session, inputs, args, kwargs)
        if self._setting(kwargs, "use_cache") is False:  # the whole text with every step, as the library does it
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        cache = self._new_cache(self._room(inputs, kwargs))
        try:
            return super().generate(inputs, *args, **{self._cache_name: cache}, **kwargs)  # type: ignore[misc]
        finally:
            cache.close()

    def _generate_in(
        self, session: InferenceSession, inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if session.active is not None and session.active is not self.blocks.sessions:
            raise StepError("this session belongs to the blocks of another model")
        if self._setting(kwargs, "use_cache") is False:
            raise StepError("a session is a cache: leave use_cache=False out, or the session")
        cache = session.cache_of(self.blocks.chain.blocks)
        if session.unknown_from is not None:
            raise StepError(
                f"from position {session.unknown_from} on this session holds hidden states whose tokens nobody knows; "
                "generate goes on from tokens: set session.position to that, or open another session"
            )
        known = session.output_ids
        if known is not None and inputs is not None and len(known) != len(inputs):
            raise StepError(f"the session has {len(known)} rows, inputs {len(inputs)}: open another one")
        parts = [part for part in (known, inputs) if part is not None]
        full = torch.cat(parts, dim=1) if parts else None
        if known is not None and full is not None:
            self._extend_mask(cache, known, full, kwargs)
        self._make_room(session, cache, full, kwargs)
        result = super().generate(full, *args, **{self._cache_name: cache}, **kwargs)  # type: ignore[misc]
        sequences = result if isinstance(result, Tensor) else result.sequences
        session.output_ids = sequences
        session.beams = (self._setting(kwargs, "num_beams") or 1) > 1
        fresh = sequences[:, 0 if known is None else known.shape[1] :]
        if isinstance(result, Tensor):
            return fresh
        result.sequences = fresh
        return result

    def _extend_mask(self, cache: ChainCache, known: Tensor, full: Tensor, kwargs: dict[str, Any]) -> None:
        """Left out, or over the new tokens only, a mask goes on from what the servers were told. The library would take
        tokens of the answer for padding where they are the padding token."""
        mask = kwargs.get("attention_mask")
        new = full.shape[1] - known.shape[1]
        if mask is None or mask.shape[1] == new != full.shape[1]:
            fresh = full.new_ones(len(full), new) if mask is None else mask
            before = cache.text_mask(len(known), known.shape[1]).to(fresh)
            kwargs["attention_mask"] = torch.cat([before, fresh], dim=1)

    def _make_room(
        self, session: InferenceSession, cache: ChainCache, full: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        """Bring the cache to where the library expects it, and refuse what does not fit before anything is sent.

        Raises:
            CacheFull: the session is too short for `max_new_tokens`.
        """
        length, rows = (1, 1) if full is None else (full.shape[1], full.shape[0])
        new = kwargs.get("max_new_tokens")
        if new is None and "max_length" not in kwargs:
            kwargs["max_length"] = session.max_length
        elif new is not None and length + new - 1 > session.max_length:  # the last token is not sent
            raise CacheFull(
                f"{length} tokens and {new} new ones do not fit into the session's max_length of {session.max_length}"
            )
        rows *= self._setting(kwargs, "num_beams") or 1
        if cache.held and (session.beams or rows != cache.rows):
            cache.restart()  # the text is sent again, for other rows than the servers have
        elif cache.get_seq_length() >= length:
            cache.keep(length - 1)  # the library needs the logits of the last token

    @property
    def _cache_name(self) -> str:
        """What the family's `generate` calls its cache."""
        named = cache_name(type(self).forward)  # type: ignore[attr-defined]
        return STATES_NAME if named == STATES_NAME else DEFAULT_CACHE_NAME

    def _setting(self, arguments: Mapping[str, Any], name: str) -> Any:
        """An argument of `generate`, or what the generation configuration says."""
        asked = arguments.get(name)
        settings = arguments.get("generation_config") or self.generation_config  # type: ignore[attr-defined]
        return getattr(settings, name, None) if asked is None else asked

    def _room(self, inputs: Tensor | None, arguments: Mapping[str, Any]) -> int:
        """Tokens per row that `generate` with these arguments may write at most, and one more for a draft's bonus."""
        embeds = arguments.get("inputs_embeds")
        length = max((part.shape[1] for part in (inputs, embeds) if part is not None), default=1)
        new, longest = self._setting(arguments, "max_new_tokens"), self._setting(arguments, "max_length")
        if new is not None:
            return length + int(new) + 1
        if longest is not None and arguments.get("max_length") is not None:
            return int(longest) + 1
        return max(longest or 0, length + DEFAULT_NEW_TOKENS) + 1


def _build_small(config: PretrainedConfig, state: dict[str, Tensor], chain: BlockChain) -> Any:
    layers = find_layers(base_class_of(config), config)
    mine = {name: tensor for name, tensor in state.items() if f"{layers}." not in name}
    model, _ = build_client(config, mine, head="causal_lm", mixins=(GenerationMixin,), dtype=torch.float32)
    model.blocks.connect(chain)
    return model


def load_causal_lm(checkpoint: Checkpoint, chain: BlockChain, **settings: Any) -> Any:
    """A language model over `chain`; see `load_model`.

    Raises: UnsupportedLibrary when the installed `transformers` fails the self-check (client_check.py).
    """
    check_client(checkpoint.config, head_class_of(checkpoint.config, "causal_lm"), _build_small)
    return load_model(checkpoint, chain, head="causal_lm", mixins=(GenerationMixin,), **settings)
