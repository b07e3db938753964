"""Generation over sessions: what a distributed language model has beyond the family's own class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from petals.models.chain import BlockChain
from petals.models.checkpoint import Checkpoint
from petals.models.distributed import DistributedMixin, load_model
from petals.models.errors import StepError
from petals.models.generation import ChainCache, InferenceSession, active_session


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
        if session is None:
            caches: list[ChainCache] = []
            try:
                return super().generate(inputs, *args, _petals_caches=caches, **kwargs)  # type: ignore[misc]
            finally:
                for cache in caches:
                    cache.close()
        known = session.output_ids
        if inputs is None and known is None:
            raise StepError("a session that is empty needs inputs to start from")
        full = torch.cat([part for part in (known, inputs) if part is not None], dim=1)
        if "max_length" not in kwargs and "max_new_tokens" not in kwargs:
            kwargs["max_length"] = session.max_length
        result = super().generate(full, *args, past_key_values=session.cache, **kwargs)  # type: ignore[misc]
        sequences = result if isinstance(result, Tensor) else result.sequences
        session.output_ids = sequences
        fresh = sequences[:, 0 if known is None else known.shape[1] :]
        if isinstance(result, Tensor):
            return fresh
        result.sequences = fresh
        return result

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        caches: list[ChainCache] = model_kwargs.pop("_petals_caches", [])
        if model_kwargs.get("past_key_values") is None:
            cache = self._new_cache(max_cache_length + 1)
            caches.append(cache)
            model_kwargs["past_key_values"] = cache
        model_kwargs["past_key_values"]._is_user_defined = True

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(  # type: ignore[misc]
            {name: value for name, value in model_kwargs.items() if name != "_petals_caches"}
        )


def load_causal_lm(checkpoint: Checkpoint, chain: BlockChain, **settings: Any) -> Any:
    """A language model over `chain`; see `load_model`."""
    return load_model(checkpoint, chain, head="causal_lm", mixins=(GenerationMixin,), **settings)
