"""Passes that several sessions share, through the library's own layers: continuous batching for families that have no
lean way (lean.py).

The new tokens of all sessions go through the blocks as one sequence, each with its own position, so that projections,
norms, experts and MLPs see one matrix of rows. Only attention needs to know whose a row is: the library lets a program
register attention by name, and the one that is registered here hands each session's queries, with its own keys and
values and its own mask, to the attention that the model would have used. Masks are made by the library, session by
session, so sliding windows are as wide as the family's configuration says.

Layers are told the name by their configuration. The copies here are shallow, with configurations of their own: other
threads run the model as it was. A model that does attention in another way - Falcon - never calls ours, and the test at
load time finds that out (selftest.py).
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from petals.models.blocks.adapters import Applied
from petals.models.blocks.cache import NoCache
from petals.models.blocks.model_views import shallow, shorten, with_ropes
from petals.models.blocks.passes import PASS_ROWS, NewTokens, Part, in_parts, positions
from petals.models.errors import UnsupportedModel
from petals.models.library_contract import cache_name

NAME = "petals-joint"
"""Of our attention, in the library's tables."""


class Joint:
    """Shared passes through the blocks of a span."""

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        blocks: range,
        applied: Applied,
        *,
        takes_positions: bool,
        own_ropes: bool,
    ) -> None:
        """`model`: the base model whose list at `path` holds `blocks`. `applied`: where their hooks look. `own_ropes`:
        sessions have rotary embeddings of their own, in their caches' views."""
        self._applied = applied
        self._blocks = blocks
        self._path = path
        self._takes_positions = takes_positions
        self._cache_name = cache_name(type(model).forward)
        self._attention: str = model.config._attn_implementation
        twin: PreTrainedModel = _twin(model, {})
        self._twin = with_ropes(twin, lambda name, module: _RopeOfEach(name)) if own_ropes else twin
        self._views: dict[range, PreTrainedModel] = {}

    def takes(self, batch: int, tokens: int, position: int) -> bool:
        """Whether a step of this shape may share a pass."""
        return batch * tokens <= PASS_ROWS

    def run(self, sessions: Sequence[NewTokens]) -> list[Tensor]:
        """As `Lean.run`, each session with its adapter. Raises UnsupportedModel when the model's blocks do not call our
        attention."""
        return in_parts(sessions, self._run_range)

    def _run_range(self, blocks: range, states: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor]:
        if blocks not in self._views:
            self._views[blocks] = shorten(self._twin, self._path, self._blocks, blocks)
        rows = torch.cat(tuple(states))[None]
        extra: dict[str, Any] = {self._cache_name: NoCache()}
        if self._takes_positions:
            extra["position_ids"] = positions(parts, rows.device)[None]
        shared = _Pass(parts, self._attention)
        self._applied.rows = rows.shape[1]
        self._applied.shares = [(part.first, part.rows, part.lora) for part in parts if part.lora is not None]
        try:
            with _running(shared):
                output = self._views[blocks](inputs_embeds=rows, use_cache=True, **extra)
        finally:
            self._applied.shares = ()
        if shared.attended != set(blocks):
            raise UnsupportedModel("its attention is not the library's common one")
        return [output.last_hidden_state[0].narrow(0, part.first, part.rows) for part in parts]


@dataclass(slots=True)
class _Pass:
    """The pass that a thread is in."""

    parts: Sequence[Part]
    attention: str
    """The name of the attention that the model would have used."""
    attended: set[int] = field(default_factory=set)


class _Running(threading.local):
    now: _Pass | None = None


_thread = _Running()


@contextmanager
def _running(shared: _Pass) -> Iterator[None]:
    _thread.now = shared
    try:
        yield
    finally:
        _thread.now = None


def _make_masks(*, mask_function: Callable[..., Any], device: torch.device | str, **others: Any) -> list[Tensor | None]:
    """What the library calls for a mask; for each session the one that it would have got by itself."""
    shared = _thread.now
    assert shared is not None
    make = ALL_MASK_ATTENTION_FUNCTIONS[shared.attention]
    masks = []
    for part in shared.parts:
        sizes = {"batch_size": part.batch, "q_length": part.tokens, "q_offset": part.position, "kv_length": part.end}
        padding = None if part.mask is None else part.mask.bool()
        given = others | sizes | {"kv_offset": 0, "attention_mask": padding}
        masks.append(make(mask_function=mask_function, device=device, **given))
    return masks


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: list[Tensor | None] | None, **others: Any
) -> tuple[Tensor, None]:
    """What the library calls for attention: query, key and value (1, heads, rows, head_dim) of the pass's new tokens.

    Returns: (1, rows, heads, head_dim).
    """
    shared = _thread.now
    if shared is None or not isinstance(attention_mask, list):
        raise UnsupportedModel("its attention has another mask than the library's common one")
    home = sys.modules[type(module).__module__]
    eager = getattr(home, "eager_attention_forward", None)
    attend = getattr(home, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS).get(shared.attention, eager)
    mixed = []
    for part, mask in zip(shared.parts, attention_mask, strict=True):
        queries, keys, values = (_of_part(tensor, part) for tensor in (query, key, value))
        keys, values = part.cache.layer(module.layer_idx).update(keys, values)
        output, _ = attend(module, queries, keys, values, mask, **others)
        mixed.append(output.reshape(1, part.rows, *output.shape[2:]))
    shared.attended.add(module.layer_idx)
    return torch.cat(mixed, 1), None


class _RopeOfEach(nn.Module):
    """Rotary embeddings that change with the length of the text: those of each session for its own rows."""

    def __init__(self, path: str) -> None:
        """`path` to them in a base model."""
        super().__init__()
        self._path = path

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **others: Any) -> tuple[Tensor, ...]:
        """cos and sin, each (1, rows, head_dim)."""
        shared = _thread.now
        assert shared is not None
        angles = []
        for part in shared.parts:
            assert isinstance(part.cache.view, nn.Module)
            rope = part.cache.view.get_submodule(self._path)
            angles.append(rope(x, position_ids.narrow(1, part.first, part.rows), *args, **others))
        return tuple(torch.cat(of_all, 1) for of_all in zip(*angles, strict=True))


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _make_masks)


def _of_part(tensor: Tensor, part: Part) -> Tensor:
    """(1, heads, rows, size) of a pass -> (batch, heads, tokens, size) of one session."""
    own = tensor[0].narrow(1, part.first, part.rows)
    return own.reshape(own.shape[0], part.batch, part.tokens, own.shape[2]).transpose(0, 1)


def _twin(module: nn.Module, configs: dict[int, PretrainedConfig]) -> Any:
    """A copy that shares all weights, whose configurations name our attention; `configs`: their copies so far."""
    children = {name: None if child is None else _twin(child, configs) for name, child in module._modules.items()}
    config = module.__dict__.get("config")
    if not isinstance(config, PretrainedConfig):
        if all(child is module._modules[name] for name, child in children.items()):
            return module
        config = None
    twin = shallow(module)
    twin._modules = children
    if config is not None:
        if id(config) not in configs:
            named = configs[id(config)] = copy.deepcopy(config)
            named._attn_implementation = NAME
        twin.config = configs[id(config)]
    return twin
