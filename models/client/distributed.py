"""A model whose blocks are somewhere else: the family's own class, embeddings and head at home.

The model is the family's own (`...Model`, `...ForCausalLM`, `...ForSequenceClassification`) with its list of blocks
replaced by a `RemoteSequential`. Everything around the blocks - embedding scale and norm, position tables, final norm,
tied heads, soft-capping, loss - and all of generation stay the library's, so whatever `transformers` does locally, this
does too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from petals.models.client.chain import BlockChain
from petals.models.client.generation import ChainCache, InferenceSession
from petals.models.client.generation_settings import read_settings
from petals.models.client.growing_cache import GrowingCache
from petals.models.client.remote_sequential import Call, RemoteSequential
from petals.models.client.trained import load_trained, save_trained
from petals.models.client.tuning import Tuning, add_tuning, get_prompt, lora_of, prompt_length
from petals.models.errors import CheckpointError, StepError, UnsupportedModel
from petals.models.families import base_class_of, base_of
from petals.models.kernels.quantize import quantize_head
from petals.models.kernels.small_matmul import FewRowsLinear
from petals.models.library_contract import CACHE_NAMES, DEFAULT_CACHE_NAME, STATES_NAME, cache_name, pop_cache
from petals.models.source.checkpoint import Checkpoint
from petals.models.source.loading import find_layers, quiet_library

Head = Literal["base", "causal_lm", "sequence_classification"]
HeadQuant = Literal["none", "int8"]
_HEADS: dict[Head, Any] = {
    "causal_lm": MODEL_FOR_CAUSAL_LM_MAPPING,
    "sequence_classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}
_NEW_HEAD = "score."
"""A classifier's own layer: may be missing from a checkpoint, is trained at home."""


class DistributedMixin:
    """What a family's class gains: sessions, and what is trained at home. Mixed in by `load_model`."""

    blocks: RemoteSequential
    head_kind: Head

    @property
    def active_session(self) -> InferenceSession | None:
        """The session of the innermost open `with` of this model in this thread or task."""
        return self.blocks.active_session

    def inference_session(self, *, max_length: int) -> InferenceSession:
        """Room for `max_length` tokens per row, shared inside of `with` by all calls of `generate`, of this model, and
        of its blocks."""
        return self.blocks.inference_session(max_length=max_length)

    def use_session(self, session: InferenceSession | None) -> AbstractContextManager[InferenceSession | None]:
        """Make `session` the active one for a while, without closing it; None: none is.

        Raises:
            StepError: it belongs to another model.
        """
        return self.blocks.use_session(session)

    def get_prompt(self, batch_size: int) -> tuple[Tensor, Tensor | None]:
        """The trained prompt (batch, pre_seq_len, hidden_size), and what "deep_ptune" adds to every block's input,
        (blocks, batch, pre_seq_len, hidden_size), or None.

        Raises:
            StepError: the model was opened without prompt tuning.
        """
        if not prompt_length(self._base):
            raise StepError('no trained prompt: open the model with tuning_mode="ptune" or "deep_ptune"')
        return get_prompt(self._base, batch_size)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write what was trained, and only that: PEFT's files (`adapter_config.json`, `adapter_model.safetensors`).

        Raises:
            StepError: nothing is trained here.
        """
        save_trained(self, self._base, Path(save_directory))

    def load_trained(self, directory: str | Path) -> None:
        """Take back what `save_pretrained` wrote, or a PEFT adapter of the same kind and shape.

        Raises:
            CheckpointError: it is something else, was made for other shapes, or is a pickle.
        """
        load_trained(self, self._base, Path(directory))

    @property
    def _base(self) -> Any:
        return self.base_model  # type: ignore[attr-defined]

    def _new_cache(self, max_length: int) -> ChainCache:
        base = self._base
        return ChainCache(self.blocks.chain, max_length, prefix=prompt_length(base), lora=lora_of(base))


def load_model(
    checkpoint: Checkpoint,
    chain: BlockChain,
    *,
    head: Head = "causal_lm",
    dtype: torch.dtype | None = None,
    tuning: Tuning | None = None,
    head_quant: HeadQuant = "none",
    mixins: Sequence[type] = (),
    **settings: Any,
) -> Any:
    """The model of a checkpoint over `chain`; reads embeddings, final norm and head, never a block.

    What was read is frozen; what `tuning` adds, and a classifier's new head, is trainable.

    Args:
        dtype: of embeddings and head; None: the checkpoint's own.
        head_quant: of a language model's head; "int8" reads it in a quarter of the bytes of float32, and rounds.
        mixins: classes in front of `DistributedMixin`.
        settings: entries of the configuration to change (`num_labels=2`).
    Raises:
        UnsupportedModel, CheckpointError; StepError for a tuning or a setting that cannot be.
    """
    config = copy.deepcopy(checkpoint.config)
    for name, value in settings.items():
        if not hasattr(config, name):
            raise StepError(f"unknown argument {name!r}: {type(config).__name__} has no such entry")
        setattr(config, name, value)
    read = checkpoint.read(list(_text_names(checkpoint.other_tensor_names())))
    names = _text_names(read)  # of what was read: the parts of a quantised weight come as one, under its name
    state = {names[name]: tensor for name, tensor in read.items()}
    if any(name != own for name, own in names.items()) and not any("lm_head" in own for own in names.values()):
        config.tie_word_embeddings = True  # which the wrapper's configuration says, not the text's (Mistral 3)
    model, info = build_client(config, state, head=head, mixins=mixins, dtype=dtype or checkpoint.dtype)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(_NEW_HEAD))
    if missing:
        raise CheckpointError(f"{checkpoint.name} lacks {', '.join(missing[:3])} ({len(missing)} tensors)")
    if model.can_generate():
        vocabulary = config.get_text_config().vocab_size
        model.generation_config, left_out = read_settings(checkpoint.directory, model.generation_config, vocabulary)
        model.ignored_settings = tuple(left_out)
        model.generation_config.use_cache = True
    output = model.get_output_embeddings()
    if type(output) is nn.Linear and head_quant == "int8":
        model.set_output_embeddings(quantize_head(output))
    elif type(output) is nn.Linear:
        output.__class__ = FewRowsLinear  # the same weights, one row a time as fast as the machine reads them
        output.prepare()  # type: ignore[operator]
    add_tuning(model.base_model, tuning or Tuning(), checkpoint.config, checkpoint.num_blocks)
    if head == "sequence_classification":
        model.score.float().requires_grad_(True)  # float32 like all that is trained, whatever the model computes in
        model.score.register_forward_pre_hook(lambda score, args: (args[0].to(score.weight.dtype),))
    model.blocks.connect(chain)
    return model


_WRAPPED = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))
"""What vision-language checkpoints put before the names of their text model, and what that has instead."""


def _text_names(names: Iterable[str]) -> dict[str, str]:
    """Names in the checkpoint -> names in the text model. Of a vision-language model only the text is read."""
    names = list(names)
    if not any("language_model." in name for name in names):
        return {name: name for name in names}
    found = {name: name for name in names if name.startswith("lm_head.")}
    for name in names:
        for prefix, instead in _WRAPPED:
            if name.startswith(prefix):
                found[name] = instead + name.removeprefix(prefix)
                break
    return found


def build_client(
    config: PretrainedConfig, state: dict[str, Tensor], *, head: Head, mixins: Sequence[type], dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """The family's class without blocks, filled from `state` and frozen; and what the library says of the loading."""
    with quiet_library():
        loaded: Any = _client_class(config, head, mixins).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    model, info = loaded
    model.eval()
    _probe_convention(model.base_model, model.blocks)
    if model.can_generate():  # MPT was published without: the whole text would be sent again for every token
        model.generation_config.use_cache = True
    model.requires_grad_(False)
    return model, info


def head_class_of(config: PretrainedConfig, head: Head) -> type[PreTrainedModel]:
    if head == "base":
        return base_class_of(config)
    try:
        found: Any = _HEADS[head][type(config)]
    except KeyError:
        raise UnsupportedModel(f"transformers has no {head.replace('_', ' ')} for {config.model_type!r}") from None
    return found[0] if isinstance(found, (tuple, list)) else found  # type: ignore[no-any-return]


def _client_class(config: PretrainedConfig, head: Head, mixins: Sequence[type]) -> type[PreTrainedModel]:
    head_class, path = head_class_of(config, head), find_layers(base_class_of(config), config)

    def __init__(self: PreTrainedModel, config: Any) -> None:
        head_class.__init__(self, config)
        base: Any = self.base_model
        stack_path, _, name = path.rpartition(".")
        stack: Any = base.get_submodule(stack_path)
        blocks = RemoteSequential()
        blocks.stand_for(getattr(stack, name))
        setattr(stack, name, blocks)
        # Second names, not second children: ours, and the ones that Petals' users know on every family.
        object.__setattr__(self, "blocks", blocks)
        for owner, alias, target in _second_names(self, base, stack, blocks):
            if not hasattr(owner, alias):
                object.__setattr__(owner, alias, target)
        stack.forward = _Around(base, stack, blocks)  # not the base's own: OPT's head calls the stack in it directly

    more: dict[str, Any] = {}
    if cache_name(head_class.forward) == STATES_NAME and hasattr(head_class, "prepare_inputs_for_generation"):
        more["prepare_inputs_for_generation"] = _only_new_tokens(head_class.prepare_inputs_for_generation)
    # The library looks conversions up by the class's name and module: keep them.
    return type(
        head_class.__name__,
        (*mixins, DistributedMixin, head_class),
        more
        | {
            "__init__": __init__,
            "forward": _with_cache_names(head_class.forward),
            "__module__": head_class.__module__,
            "__qualname__": head_class.__qualname__,
            "base_model": property(base_of),
            "head_kind": head,
        },
    )


def _second_names(model: Any, base: Any, stack: Any, blocks: RemoteSequential) -> list[tuple[Any, str, Any]]:
    """(owner, name, what it leads to): BLOOM's names for the parts around the blocks, which Petals' users know."""
    norms = [child for name, child in stack.named_children() if name.endswith(("norm", "ln_f")) and child is not None]
    parts = [
        (model, "transformer", base),
        (base, "h", blocks),
        (base, "word_embeddings", base.get_input_embeddings()),
        (base, "word_embeddings_layernorm", nn.Identity()),
        (base, "ln_f", norms[-1] if norms else nn.Identity()),
        (base, "get_prompt", model.get_prompt),
    ]
    head = model.get_output_embeddings()
    return parts if head is None else [*parts, (model, "lm_head", head)]


def _with_cache_names(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `forward` that takes and returns its cache under every name that a release has had."""
    name = cache_name(forward)

    @functools.wraps(forward)
    def with_names(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = pop_cache(kwargs)
        if cache is not None:
            kwargs[name] = cache
        output = forward(self, *args, **kwargs)
        for other in CACHE_NAMES:
            if hasattr(output, name) and not hasattr(output, other):
                object.__setattr__(output, other, getattr(output, name))
        return output

    return with_names


def _only_new_tokens(prepare: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The library asks a cache of keys and values how long it is; to a state space it sends the whole text again."""

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made = prepare(self, input_ids, *args, **kwargs)
        cache, ids = made.get(STATES_NAME), made.get("input_ids")
        if isinstance(cache, ChainCache) and ids is not None:
            made["input_ids"] = ids[:, cache.get_seq_length() - input_ids.shape[1] :]
        return made

    return prepare_inputs_for_generation


def _probe_convention(base: Any, blocks: RemoteSequential) -> None:
    """Find out whether the family's stack takes what a block returns, or the first item of it, or one of two items.

    Two rows of two tokens go through with blocks that do nothing: the wrong answer loses a dimension.
    """
    ids = torch.zeros(2, 2, dtype=torch.long, device=base.device)
    for blocks.tuple_size in (0, 1, 2):
        with torch.no_grad(), contextlib.suppress(Exception), blocks.pretending():
            if base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state.shape[
                :2
            ] == (2, 2):
                return
    raise UnsupportedModel(f"{type(base).__name__} does not loop over its blocks as other families do")


class _Around:
    """Stands for the `forward` of the stack, the part of the base model that loops over the blocks: tells them what it
    was called with before it makes masks of it, puts a trained prompt in front, and gives back hidden states of all
    blocks, which the library's own recorder cannot see."""

    def __init__(self, base: Any, stack: Any, blocks: RemoteSequential) -> None:
        self._base = base
        self._blocks = blocks
        self._forward = stack.forward
        self._names = tuple(inspect.signature(stack.forward).parameters)
        self._cache_name = cache_name(type(stack).forward)
        functools.update_wrapper(self, stack.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(zip(self._names, args, strict=False)) | kwargs
        session = None
        cache = pop_cache(kwargs)
        if cache is not None and not isinstance(cache, ChainCache):
            raise StepError(f"{DEFAULT_CACHE_NAME} of a distributed model come from its own sessions")
        if cache is None and kwargs.get("use_cache") is not False:
            session = self._blocks.active_session
            cache = self._new_cache(kwargs) if session is None else self._cache_of(session)
        kwargs["use_cache"] = cache is not None
        outputs = self._take_recorder(kwargs)
        prefix, lora = prompt_length(self._base), lora_of(self._base)
        position = 0
        if cache is not None:
            kwargs[self._cache_name] = cache
            cache.begin(prefix, lora)
            position = cache.get_seq_length()
            if _checked_mask(kwargs.get("attention_mask")) is not None:
                kwargs["attention_mask"] = cache.full_mask(kwargs["attention_mask"], _new_tokens(kwargs))
        text = kwargs.get("input_ids")
        fresh = cache is None or not cache.held
        deep = self._put_prompt(kwargs, prefix, fresh=fresh) if prefix else None
        call = Call(
            attention_mask=_checked_mask(kwargs.get("attention_mask")),
            cache=cache,
            prompts=deep,
            lora=lora,
            outputs=outputs,
        )
        with cache.counting_prefix() if cache is not None else contextlib.nullcontext(), self._blocks.called_with(call):
            result = self._forward(**kwargs)
        if session is not None:
            session.note_tokens(text, position)
        cut = prefix if fresh else 0
        result.last_hidden_state = result.last_hidden_state[:, cut:]
        if outputs is not None:
            states = [*outputs[:-1], result.last_hidden_state]
            result.hidden_states = tuple(state if state is states[-1] else state[:, cut:] for state in states)
        return result

    def _cache_of(self, session: InferenceSession) -> ChainCache:
        if session.beams:
            raise StepError("the rows of this session are the beams of a search; go on with generate()")
        return session.cache_of(self._blocks.chain.blocks)

    def _new_cache(self, kwargs: dict[str, Any]) -> ChainCache | None:
        """What is returned to a caller who passed no cache; None: nothing is wanted."""
        wanted = kwargs.get("use_cache")
        if not (getattr(self._base.config, "use_cache", True) if wanted is None else wanted) or self._blocks.pretends:
            return None
        return GrowingCache(self._blocks.chain, eager=wanted is True)

    def _take_recorder(self, kwargs: dict[str, Any]) -> list[Tensor] | None:
        """A list for the hidden states if the caller, or the configuration, wants them; its first entry is their
        input."""
        for what in ("output_attentions", "output_hidden_states"):
            value = kwargs.get(what)
            kwargs[what] = getattr(self._base.config, what, False) if value is None else value
        if kwargs.pop("output_attentions"):
            raise StepError("attention weights stay with the servers; ask for output_hidden_states")
        wanted = kwargs.pop("output_hidden_states")
        if not isinstance(wanted, bool):
            raise StepError(f"output_hidden_states is True or False here, not {wanted!r}")
        if "return_dict" in kwargs:
            kwargs["return_dict"] = True
        return [] if wanted else None

    def _put_prompt(self, kwargs: dict[str, Any], prefix: int, *, fresh: bool) -> Tensor | None:
        """Put the trained prompt in front of the text; returns what goes into the blocks besides."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], prefix), mask], dim=1)
        if positions is not None:
            kwargs["position_ids"] = positions + prefix
        if not fresh:
            return None
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = self._base.get_input_embeddings()(kwargs.pop("input_ids"))
        prompt, deep = get_prompt(self._base, embeds.shape[0])
        kwargs["inputs_embeds"] = torch.cat([prompt.to(embeds.dtype), embeds], dim=1)
        if positions is not None:
            front = torch.arange(prefix, device=positions.device).expand(positions.shape[0], -1)
            kwargs["position_ids"] = torch.cat([front, positions + prefix], dim=1)
        return deep


def _new_tokens(kwargs: dict[str, Any]) -> int:
    given = kwargs.get("inputs_embeds")
    if given is None:
        given = kwargs.get("input_ids")
    return 0 if given is None else int(given.shape[1])


def _checked_mask(mask: Tensor | None) -> Tensor | None:
    if mask is not None and mask.dim() != 2:
        raise StepError(f"attention_mask must be (batch, tokens), got {tuple(mask.shape)}")
    return mask
