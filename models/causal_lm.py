"""A language model whose blocks are somewhere else: the family's own class, embeddings and head at home.

The model is the family's `...ForCausalLM` with its list of blocks replaced by a `RemoteSequential`. Everything around
the blocks - embedding scale and norm, position tables, final norm, tied heads, soft-capping, loss - and all of
generation stay the library's, so whatever `transformers` does locally, this does too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from petals.models.block import config_slice
from petals.models.chain import BlockChain
from petals.models.checkpoint import Checkpoint
from petals.models.errors import CheckpointError, StepError, UnsupportedModel
from petals.models.families import base_class_of
from petals.models.generation import ChainCache, InferenceSession, active_session
from petals.models.loading import find_layers, quiet_library
from petals.models.remote_sequential import RemoteSequential


class DistributedMixin:
    """What a family's class gains: sessions, and generation over them. Mixed in by `load_causal_lm`."""

    blocks: RemoteSequential

    @property
    def active_session(self) -> InferenceSession | None:
        """The session of the innermost open `with` in this context."""
        return active_session.get()

    def inference_session(self, *, max_length: int) -> InferenceSession:
        """Room for `max_length` tokens per row, shared by all `generate` calls inside of `with`."""
        return InferenceSession(self.blocks.chain, max_length)

    @contextlib.contextmanager
    def use_session(self, session: InferenceSession | None) -> Iterator[InferenceSession | None]:
        """Make `session` the active one for a while, without closing it."""
        token = active_session.set(session)
        try:
            yield session
        finally:
            active_session.reset(token)

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
            cache = ChainCache(self.blocks.chain, max_cache_length + 1)
            caches.append(cache)
            model_kwargs["past_key_values"] = cache
        model_kwargs["past_key_values"]._is_user_defined = True

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(  # type: ignore[misc]
            {name: value for name, value in model_kwargs.items() if name != "_petals_caches"}
        )


def load_causal_lm(checkpoint: Checkpoint, chain: BlockChain, *, dtype: torch.dtype | None = None) -> Any:
    """The model of a checkpoint over `chain`; reads embeddings, final norm and head, never a block.

    Args:
        dtype: of embeddings and head; None: the checkpoint's own.
    Raises:
        UnsupportedModel, CheckpointError.
    """
    config = checkpoint.config
    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UnsupportedModel(f"transformers has no language model for {config.model_type!r}") from None
    head_class: Any = found[0] if isinstance(found, (tuple, list)) else found
    path = find_layers(base_class_of(config), config)
    client_class = _client_class(head_class, path)
    state = checkpoint.read(checkpoint.other_tensor_names())
    dtype = dtype or checkpoint.dtype
    with quiet_library():
        loaded: Any = client_class.from_pretrained(
            None, config=config_slice(config, range(1)), state_dict=state, dtype=dtype, output_loading_info=True
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{checkpoint.name} lacks {', '.join(missing[:3])} ({len(missing)} tensors)")
    if (directory := checkpoint.directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(directory.parent))
    model.eval()
    _probe_convention(model, model.blocks)
    model.blocks.connect(chain)
    return model


def _client_class(head_class: type[PreTrainedModel], path: str) -> type[PreTrainedModel]:
    def __init__(self: PreTrainedModel, config: Any) -> None:
        head_class.__init__(self, config)
        base = getattr(self, head_class.base_model_prefix)
        stack_path, _, name = path.rpartition(".")
        stack = base.get_submodule(stack_path)
        blocks = RemoteSequential()
        setattr(stack, name, blocks)
        object.__setattr__(self, "blocks", blocks)  # a second name, not a second child
        base.register_forward_pre_hook(_Before(blocks), with_kwargs=True)
        base.register_forward_hook(_After(blocks), always_call=True)

    # The library looks conversions up by the class's name and module: keep them.
    return type(
        head_class.__name__,
        (DistributedMixin, head_class),
        {"__init__": __init__, "__module__": head_class.__module__, "__qualname__": head_class.__qualname__},
    )


def _probe_convention(model: Any, blocks: RemoteSequential) -> None:
    """Find out whether the family's stack takes what a block returns, or the first item of it.

    Two rows of two tokens go through with blocks that do nothing: the wrong answer loses a dimension.
    """
    base = getattr(model, type(model).base_model_prefix)
    ids = torch.zeros(2, 2, dtype=torch.long, device=model.device)
    for blocks.wants_tuple in (False, True):
        with torch.no_grad(), contextlib.suppress(Exception), blocks.pretending():
            if base(input_ids=ids, use_cache=False).last_hidden_state.shape[:2] == (2, 2):
                return
    raise UnsupportedModel(f"{type(model).__name__} does not loop over its blocks as other families do")


class _Before:
    """Tells the blocks what the base model was called with, before it makes masks of it."""

    def __init__(self, blocks: RemoteSequential) -> None:
        self._blocks = blocks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, ChainCache):
            raise StepError("past_key_values of a distributed model come from its own sessions")
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise StepError(f"attention_mask must be (batch, tokens), got {tuple(mask.shape)}")
        if cache is None:
            kwargs["use_cache"] = False
        self._blocks.calling(mask, cache)


class _After:
    def __init__(self, blocks: RemoteSequential) -> None:
        self._blocks = blocks

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._blocks.called()
