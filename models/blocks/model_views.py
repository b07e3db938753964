"""Views of a base model: shallow copies that share its weights, over other blocks or with rotary embeddings apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


def get_layers(model: nn.Module, path: str) -> nn.ModuleList:
    """The list of blocks at `path` of a base model."""
    found = model.get_submodule(path)
    assert isinstance(found, nn.ModuleList)
    return found


def shallow(module: nn.Module) -> Any:
    """A copy that shares parameters and children with `module`, but may be given other children."""
    twin = object.__new__(type(module))  # `copy.copy` refuses parametrized weights, as quantised experts have
    twin.__dict__ = module.__dict__ | {"_modules": dict(module._modules)}
    return twin


def _own_parents(twin: nn.Module, path: str) -> tuple[Any, str]:
    """Give a shallow copy its own copies of the modules on the way to `path`; the last of them, and the name in it."""
    *parents, name = path.split(".")
    for parent in parents:
        twin._modules[parent] = child = shallow(getattr(twin, parent))
        twin = child
    return twin, name


def shorten(model: PreTrainedModel, path: str, have: range, want: range) -> PreTrainedModel:
    """The base model over `want`, a sub-range of its blocks `have`; weights are shared."""
    twin = shallow(model)
    owner, name = _own_parents(twin, path)
    layers = get_layers(model, path)[want.start - have.start : want.stop - have.start]
    owner._modules[name] = layers
    # The stack zips its blocks with per-layer entries of the configuration ("layer_types"), which are still those of
    # the whole model; the blocks themselves were built from it and keep it.
    shortened = config_slice(model.config, want)
    twin.config = shortened
    if owner is not twin and hasattr(owner, "config"):
        owner.config = shortened
    result: PreTrainedModel = twin
    return result


_NOT_PER_LAYER = ("time_step_limit", "mrope_section", "architectures")
"""Lists that may happen to be as long as there are layers."""


_DEPRECATED = {"torch_dtype", "use_return_dict"}
"""Properties of every configuration that print a warning when they are read (transformers 5.23)."""


def config_slice(config: PretrainedConfig, blocks: range) -> PretrainedConfig:
    """A configuration of `len(blocks)` layers: every list with one entry per layer of the whole model is cut."""
    total = config.num_hidden_layers
    sliced = copy.deepcopy(config)
    for key, value in list(vars(sliced).items()):
        if key not in _NOT_PER_LAYER and isinstance(value, (list, tuple)) and len(value) == total > 1:
            setattr(sliced, key, type(value)(value[blocks.start : blocks.stop]))
    sliced.num_hidden_layers = len(blocks)
    if blocks.start:
        _pin_computed(sliced, config, blocks)
    return sliced


def _pin_computed(sliced: PretrainedConfig, config: PretrainedConfig, blocks: range) -> None:
    """Lists per layer that the class computes from a layer's number (Jamba's kinds of layers) start at layer 0."""
    computed: dict[str, Any] = {}
    for name in sorted({*dir(type(config))} - _DEPRECATED):
        if isinstance(getattr(type(config), name, None), property):
            with suppress(Exception):  # properties that this configuration has no use for
                value = getattr(config, name)
                if isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers:
                    computed[name] = value[blocks.start : blocks.stop]
    if computed:
        sliced.__class__ = type(type(config).__name__, (type(config),), computed)


def _rotary_modules(model: nn.Module) -> Sequence[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "rope_type")]


def has_stateful_rope(model: nn.Module) -> bool:
    kinds = [module.rope_type for _, module in _rotary_modules(model)]
    flat = [k for kind in kinds for k in (kind.values() if isinstance(kind, dict) else [kind])]
    return any("dynamic" in str(kind) or kind == "longrope" for kind in flat)


def with_own_rope(view: PreTrainedModel) -> PreTrainedModel:
    """A view whose rotary embeddings are its own; the stack's ones, blocks of the families known hold none."""
    return with_ropes(view, lambda name, module: copy.deepcopy(module))


def with_ropes(view: PreTrainedModel, make: Callable[[str, nn.Module], nn.Module]) -> PreTrainedModel:
    """A view with other rotary embeddings; `make` is told path and module of each."""
    twin: PreTrainedModel = shallow(view)
    for name, module in _rotary_modules(view):
        owner, leaf = _own_parents(twin, name)
        owner._modules[leaf] = make(name, module)
    return twin


def own_tensors(layers: Sequence[nn.Module]) -> dict[str, int]:
    """Tensors that are neither parameters nor buffers, by the attributes that hold them."""
    modules = [module for layer in layers for module in layer.modules()]
    return {
        f"{type(module).__name__}.{name}": id(value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def device_of(layer: nn.Module, told: torch.device) -> torch.device:
    """With the index of a GPU. A block whose norms have no weights may hold no tensor (OLMo 1, kept in float16)."""
    return next((tensor.device for tensor in chain(layer.parameters(), layer.buffers())), told)
