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
from petals.models.client.generation import InferenceSession, active_session
from petals.models.errors import StepError
from petals.models.families import base_class_of
from petals.models.library_contract import DEFAULT_CACHE_NAME, pop_cache
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
        session = session or active_session.get()
        inputs = kwargs.pop("input_ids", inputs)
        given = pop_cache(kwargs)
        if session is None and given is not None:
            return super().generate(inputs, *args, **{DEFAULT_CACHE_NAME: given}, **kwargs)  # type: ignore[misc]
        if session is None:
            cache = self._new_cache(self._room(inputs, kwargs))
            try:
                return super().generate(inputs, *args, **{DEFAULT_CACHE_NAME: cache}, **kwargs)  # type: ignore[misc]
            finally:
                cache.close()
        known = session.output_ids
        if inputs is None and known is None:
            raise StepError("a session that is empty needs inputs to start from")
        full = torch.cat([part for part in (known, inputs) if part is not None], dim=1)
        if "max_length" not in kwargs and "max_new_tokens" not in kwargs:
            kwargs["max_length"] = session.max_length
        result = super().generate(full, *args, **{DEFAULT_CACHE_NAME: session.cache}, **kwargs)  # type: ignore[misc]
        sequences = result if isinstance(result, Tensor) else result.sequences
        session.output_ids = sequences
        fresh = sequences[:, 0 if known is None else known.shape[1] :]
        if isinstance(result, Tensor):
            return fresh
        result.sequences = fresh
        return result

    def _room(self, inputs: Tensor | None, arguments: Mapping[str, Any]) -> int:
        """Tokens per row that `generate` with these arguments may write at most, and one more for a draft's bonus."""
        settings = arguments.get("generation_config") or self.generation_config  # type: ignore[attr-defined]
        embeds = arguments.get("inputs_embeds")
        length = max((part.shape[1] for part in (inputs, embeds) if part is not None), default=1)

        def setting(name: str) -> int | None:
            asked = arguments.get(name)
            return getattr(settings, name, None) if asked is None else asked

        new, longest = setting("max_new_tokens"), setting("max_length")
        if new is not None:
            return length + new + 1
        if longest is not None and arguments.get("max_length") is not None:
            return longest + 1
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
