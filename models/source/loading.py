"""From a checkpoint to a span of blocks in memory, reading nothing but those blocks' tensors.

The contract, generic over `transformers` 5: run the family's own base model with everything but the wanted blocks
taken out. Masks, rotary embeddings, alibi, sliding windows and the conversion of old weight names stay the library's.

1. The whole base model is built without memory (on the meta device), so that each block knows its absolute index:
   some families choose a block's shape or its scaling by it.
2. Its list of blocks is cut to the span. Around it, norms and dropouts become the identity and position tables zero,
   since embeddings, final norm and head live at the client; the rotary embedding stays.
3. Stand-ins for the span's tensors (standin.py), renamed to their place in the shortened list, are handed to
   `from_pretrained`, which converts (fused experts) and computes the rotary buffers.
4. Every weight gets its numbers, one matrix at a time, in the bits that it will be kept in (assemble.py).
5. A self-test compares the result with the model's own layer before anybody is served (selftest.py).
"""

from __future__ import annotations

import copy
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from petals.models.blocks.assemble import Keeping, Proof, assemble
from petals.models.blocks.block import BlockSpan
from petals.models.blocks.model_views import get_layers
from petals.models.blocks.selftest import agrees, check_span, check_weights
from petals.models.blocks.standin import stand_in
from petals.models.errors import BlockRangeError, CheckpointError, UnsupportedModel
from petals.models.families import base_class_of, family_of
from petals.models.kernels.backends import usable
from petals.models.kernels.machine import freed_memory_returned
from petals.models.kernels.quantize import check_quant_type
from petals.models.progress import Meter
from petals.models.source.checkpoint import Checkpoint, Progress
from petals.models.source.sources import block_sources

log = logging.getLogger(__name__)

_STRANGE = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, OSError),
    StrictDataclassError,
)
"""What model code that was not written for this may raise."""


@contextmanager
def foreign_errors(doing: str) -> Iterator[None]:
    """Turn what the library or a model's code raises in here into an UnsupportedModel of one line.

    `doing`: what failed, such as "llama0 cannot be served".
    """
    try:
        yield
    except ImportError as error:
        raise UnsupportedModel(f"{doing}: it needs a Python package: {first_line(error)}") from error
    except _STRANGE as error:
        raise UnsupportedModel(f"{doing}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What it says, without the rest."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_span(
    checkpoint: Checkpoint,
    blocks: range,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quant_type: str = "none",
    self_test: bool = True,
    deterministic: bool = False,
    keep_transposed: bool = True,
    progress: Progress | None = None,
) -> BlockSpan:
    """Load `blocks` of a checkpoint, and nothing else of it.

    Args:
        dtype: what the blocks compute in; None: the checkpoint's own.
        quant_type: "none", "int8" or "nf4" (quantize.py).
        self_test: compare with the model's own layer before returning.
        deterministic: choose no product by measurement: every process on such a machine rounds alike.
        keep_transposed: let training take as much memory again for float32 weights that are kept in half the bytes
            (float16_weights.py); otherwise its backward passes are slower.
    Raises: BlockRangeError, CheckpointError, UnsupportedModel.
    """
    check_range(checkpoint, blocks)
    dtype = dtype or checkpoint.dtype
    keeping = Keeping(dtype, torch.device(device), check_quant_type(quant_type), keep_transposed)
    _say_what_is_slow(checkpoint, keeping, progress)
    with freed_memory_returned():
        model, path, proofs = _load(checkpoint, prepare_config(checkpoint, keeping), blocks, keeping, progress)
    span = BlockSpan(model, path, blocks, quant_type=quant_type, dtype=dtype, device=device)
    _prepare(span, checkpoint, proofs if self_test else None, deterministic)
    return span


def _say_what_is_slow(checkpoint: Checkpoint, keeping: Keeping, progress: Progress | None) -> None:
    packed = checkpoint.scheme is not None and keeping.quant_type == "none"
    if progress is not None and packed and keeping.device.type == "cpu" and not usable():
        assert checkpoint.scheme is not None
        progress(
            f"{checkpoint.scheme.format.title} weights are dequantised for every step by torch's operations, about ten "
            "times slower than by compiled ones: pip install petals-libp2p[fast] (numba)"
        )


def _prepare(span: BlockSpan, checkpoint: Checkpoint, proofs: list[Proof] | None, deterministic: bool) -> None:
    """Let the span learn its caches' shapes and prove itself (None: without that). Raises UnsupportedModel."""
    family = family_of(checkpoint.config)
    title = f"{checkpoint.name} ({family.title})"
    try:
        with foreign_errors(f"{title} cannot be served"):
            _prove(span, checkpoint, proofs, deterministic, title)
    except UnsupportedModel as error:
        raise error if title in str(error) else UnsupportedModel(f"{title} cannot be served: {error}") from None


def _prove(
    span: BlockSpan, checkpoint: Checkpoint, proofs: list[Proof] | None, deterministic: bool, title: str
) -> None:
    span.measure_shapes()
    if proofs is not None:
        check_span(span, title=title, thorough=span.keeps_states or not family_of(checkpoint.config).verified)
        check_weights(span, proofs, title=title)
    span.find_lean_path(measured=not deterministic)
    if span.lean and not agrees(span):
        span.drop_lean_path()
        log.warning("%s: the lean path differs from transformers' own, so that one is used; it is slower", title)
    if not span.lean and not deterministic:  # then nobody shares a pass
        share_layers(span, checkpoint)


def share_layers(span: BlockSpan, checkpoint: Checkpoint) -> None:
    """Let sessions share passes through the library's layers (joint.py), if that gives what each gets alone: for
    families that have no lean way, and for adapters. Some models do their attention in a way of their own.

    Only for families that the tests prove exact: a mask may be of a kind that a few tokens do not show.
    """
    family = family_of(checkpoint.config)
    if not family.verified or span.keeps_states:
        return
    try:
        span.find_joint_path()
        right = agrees(span, joint=True)
    except (*_STRANGE, UnsupportedModel):
        right = False
    if not right:
        span.drop_joint_path()
        log.info("%s (%s): sessions do not share passes", checkpoint.name, family.title)


def _load(
    checkpoint: Checkpoint, config: PretrainedConfig, blocks: range, keeping: Keeping, progress: Progress | None
) -> tuple[PreTrainedModel, str, list[Proof]]:
    """`load_shortened` with the weights' numbers in it, on the device; and proofs of the first block."""
    model, path = load_shortened(checkpoint, config, blocks, keeping.dtype)
    doing = f"reading blocks {blocks.start}:{blocks.stop}"
    if keeping.quant_type != "none":
        doing = f"quantising to {keeping.quant_type}"
    meter = Meter(progress, doing, len(blocks), "blocks")
    proofs: list[Proof] = []
    for done, layer in enumerate(get_layers(model, path), 1):
        made = assemble(layer, keeping)
        proofs = proofs or made
        meter.note(done)
    nn.Module.to(model, keeping.device)
    model.requires_grad_(False)
    return model, path, proofs


def check_range(checkpoint: Checkpoint, blocks: range) -> None:
    """Raise BlockRangeError unless `blocks` is a non-empty consecutive range of the model's blocks."""
    if not 0 <= blocks.start < blocks.stop <= checkpoint.num_blocks or blocks.step != 1:
        raise BlockRangeError(
            f"{checkpoint.name} has blocks 0:{checkpoint.num_blocks}; {blocks.start}:{blocks.stop} is not among them"
        )


def prepare_config(checkpoint: Checkpoint, keeping: Keeping) -> PretrainedConfig:
    """The configuration the span is built from: no vocabulary, no dropout paths, no cached generation defaults."""
    config = copy.deepcopy(checkpoint.config)
    if checkpoint.scheme is not None or keeping.quant_type != "none" or keeping.halves:
        config._experts_implementation = "eager"  # one expert after another: a stack in fewer bytes is no tensor
    config.vocab_size = 1
    config.pad_token_id = 0  # of the vocabulary of one; some configurations take no None
    config.use_cache = True
    return config


def load_shortened(
    checkpoint: Checkpoint, config: PretrainedConfig, blocks: range, dtype: torch.dtype
) -> tuple[PreTrainedModel, str]:
    """The base model of `config` whose list of blocks, at the path returned, holds `blocks`, with stand-ins for their
    weights (standin.py)."""
    base_class = base_class_of(config)
    path = find_layers(base_class, config)
    state = stand_for_blocks(checkpoint, blocks, path)
    with quiet_library(), foreign_errors(f"{base_class.__name__} cannot take the blocks of {checkpoint.name}"):
        # mismatches are ignored by the library, not by `_check_loaded`, which names them
        loaded: Any = span_class(base_class, path, blocks).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    _check_loaded(checkpoint, info, path, blocks.start)
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    return model, path


def span_class(base_class: type[PreTrainedModel], path: str, blocks: range) -> type[PreTrainedModel]:
    """A subclass of the family's base model that keeps only `blocks` once it is built."""

    def __init__(self: PreTrainedModel, config: PretrainedConfig) -> None:
        base_class.__init__(self, config)
        cut(self, path, blocks)

    # The library looks conversions up by the class's name and module: keep them.
    return type(
        base_class.__name__,
        (base_class,),
        {"__init__": __init__, "__module__": base_class.__module__, "__qualname__": base_class.__qualname__},
    )


def cut(model: nn.Module, path: str, blocks: range) -> None:
    """Take everything but `blocks` and the rotary embeddings out of a base model, in place."""
    stack_path, _, name = path.rpartition(".")
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    owner = model
    for step in [*filter(None, stack_path.split(".")), name]:
        for child_name, child in list(owner.named_children()):
            if child_name == step or _is_rotary(child):
                continue
            owner._modules[child_name] = _neutral(child_name, child)
        if step != name:
            owner = owner.get_submodule(step)
    owner._modules[name] = nn.ModuleList(list(layers)[blocks.start : blocks.stop])


def _is_rotary(child: nn.Module) -> bool:
    """Whether it makes positions, or is a list of such (one for each base, as Granite-SWA has them)."""
    if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
        inner = list(child.children())
        return bool(inner) and all(map(_is_rotary, inner))
    return "rotary" in type(child).__name__.lower()


class _Through(nn.Identity):
    """Hands on its first tensor, by position or by name: embeddings of which only the norm is left to do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = kwargs.get("inputs_embeds")
        return named if named is not None else next(each for each in (*args, *kwargs.values()) if each is not None)


class _NoPositions(nn.Module):
    """A learned position table that adds nothing: the client's embeddings have it in already."""

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return torch.zeros(())  # without dimensions it changes neither shape nor dtype of what it is added to


_POSITION_TABLES = re.compile(r"wpe|position|pos_emb")


def _neutral(name: str, child: nn.Module) -> nn.Module:
    return _NoPositions() if _POSITION_TABLES.search(name) else _Through()


def block_numel(config: PretrainedConfig) -> int:
    """Weights of the largest block, known from the configuration alone."""
    return max(sum(weight.numel() for weight in layer.parameters()) for layer in skeleton_blocks(config))


def skeleton_blocks(config: PretrainedConfig) -> nn.ModuleList:
    """A model's blocks without their weights."""
    base_class = base_class_of(config)
    path = find_layers(base_class, config)
    with torch.device("meta"), quiet_library(), foreign_errors(f"{base_class.__name__} cannot be built"):
        return get_layers(base_class(config), path)


_paths: dict[tuple[type[PreTrainedModel], str], str] = {}
"""What `find_layers` found, by class and configuration."""


def find_layers(base_class: type[PreTrainedModel], config: PretrainedConfig) -> str:
    """Path of the list of blocks in the base model ("layers", "h", "decoder.layers")."""
    known = family_of(config).layers
    if known is not None:
        return known
    key = (base_class, config.to_json_string())
    if key not in _paths:
        _paths[key] = _search_layers(base_class, config)
    return _paths[key]


def _search_layers(base_class: type[PreTrainedModel], config: PretrainedConfig) -> str:
    total = config.num_hidden_layers
    with torch.device("meta"), quiet_library(), foreign_errors(f"{base_class.__name__} cannot be built"):
        skeleton = base_class(config)
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return str(name)
    raise UnsupportedModel(
        f"{base_class.__name__} has no list of {total} blocks; name it with register_family(layers=...)"
    )


def stand_for_blocks(checkpoint: Checkpoint, blocks: range, path: str) -> dict[str, Tensor]:
    """Stand-ins for the tensors of `blocks`, named as in the shortened base model. Headers are read, no weights."""
    return {
        f"{path}.{block - blocks.start}.{rest}": stand_in(source)
        for block in blocks
        for rest, source in block_sources(checkpoint, block).items()
    }


def _check_loaded(checkpoint: Checkpoint, info: dict[str, Any], path: str, start: int) -> None:
    """Raise unless every tensor of the blocks found its place and every place its tensor; `start`: the first block."""

    def in_the_model(key: str) -> str:
        place = re.fullmatch(rf"{re.escape(path)}\.([0-9]+)\.(.*)", key)
        return f"{path}.{int(place[1]) + start}.{place[2]}" if place else key

    missing = sorted(in_the_model(key) for key in info["missing_keys"] if key.startswith(path + "."))
    strange = sorted(map(in_the_model, info["unexpected_keys"]))
    wrong = sorted(str(entry) for entry in info["mismatched_keys"])
    for what, keys in (("lacks", missing), ("has unknown", strange), ("has wrongly shaped", wrong)):
        if keys:
            raise CheckpointError(f"{checkpoint.name} {what} block tensors: {', '.join(keys[:3])} ({len(keys)} in all)")


_library_lock = threading.RLock()


@contextmanager
def quiet_library() -> Iterator[None]:
    """Build and load models in here: quietly, with errors as exceptions, and one thread at a time.

    `from_pretrained` patches torch's initialisers and dtype for the whole process (transformers 5.23): two threads that
    loaded at once found tied heads missing in 10 of 24 tries.
    """
    from transformers.utils import logging as library_logging

    library = logging.getLogger("transformers")
    with _library_lock:
        level = library.level
        had_bars = library_logging.is_progress_bar_enabled()
        library_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        library.setLevel(logging.ERROR)
        try:
            yield
        finally:
            library.setLevel(level)
            if had_bars:
                library_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
