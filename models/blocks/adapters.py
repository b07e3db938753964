"""LoRA on blocks: hosted by a server (PEFT's files), or sent by a client that trains them.

A low-rank update adds `scaling * (x A^T) B^T` to what a linear layer puts out. It is applied by hooks that look up this
thread's adapter, so one loaded span serves requests with different adapters, and without any, side by side; the blocks'
own weights stay as they are, quantised or not.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from petals.models.errors import CheckpointError, StepError

if TYPE_CHECKING:
    from petals.models.blocks.block import BlockSpan

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_MAX_ALPHA = 1e6
_MAX_PATTERN = 500


@dataclass(frozen=True, slots=True)
class LowRank:
    """One layer's update."""

    a: Tensor
    """(rank, in_features)"""
    b: Tensor
    """(out_features, rank)"""
    scaling: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """The update for (..., in_features), in the dtype of the factors: (..., out_features)."""
        rows = hidden.to(self.a.dtype)
        return nn.functional.linear(nn.functional.linear(rows, self.a), self.b) * self.scaling


@dataclass(frozen=True, slots=True)
class Lora:
    """Updates of some layers of some blocks. Factors may require gradients: they flow through `BlockSpan.forward`."""

    name: str
    layers: Mapping[tuple[int, str], LowRank]
    """(absolute block, path of the linear layer within it) -> its update."""

    @property
    def nbytes(self) -> int:
        return sum(factor.numel() * factor.element_size() for factor in self.factors())

    def factors(self) -> list[Tensor]:
        """All factors, A before B, in the order of `layers`."""
        return [factor for layer in self.layers.values() for factor in (layer.a, layer.b)]

    def detached(self) -> Lora:
        """The numbers alone, on the CPU."""
        layers = {
            place: LowRank(layer.a.detach().cpu(), layer.b.detach().cpu(), layer.scaling)
            for place, layer in self.layers.items()
        }
        return Lora(self.name, layers)

    def of(self, blocks: range) -> Lora:
        """The part that concerns `blocks`."""
        return Lora(self.name, {place: layer for place, layer in self.layers.items() if place[0] in blocks})


def load_lora(directory: Path, span: BlockSpan, *, name: str | None = None) -> Lora:
    """Read what PEFT's `save_pretrained` wrote, as far as it touches the span's blocks.

    Raises: CheckpointError when it is no LoRA, is a pickle, needs what is not supported, or was made for other shapes.
    """
    name = name or directory.name
    config = _read_config(directory, name)
    tensors = _read_tensors(directory, name, span.blocks)
    pairs: dict[tuple[int, str], dict[str, Tensor]] = {}
    for (block, path, side), tensor in tensors.items():
        pairs.setdefault((block, path), {})[side] = tensor
    layers: dict[tuple[int, str], LowRank] = {}
    for (block, path), pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"adapter {name} has only half of the factors of {path} in block {block}")
        a, b = (pair[side].to(device=span.device, dtype=span.dtype) for side in "AB")
        if a.ndim != 2 or not a.shape[0]:
            raise CheckpointError(f"adapter {name}: {path} of block {block} has a factor without rank")
        layers[block, path] = LowRank(a, b, _scaling(config, path, a.shape[0]))
    lora = Lora(name, layers)
    try:
        check_lora(lora, span)
    except StepError as error:
        raise CheckpointError(str(error)) from error
    return lora


def check_lora(lora: Lora, span: BlockSpan) -> None:
    """Raise StepError unless every update fits a linear layer of the span."""
    for (block, path), layer in lora.layers.items():
        if block not in span.blocks:
            raise StepError(
                f"adapter {lora.name} is for block {block}, loaded are {span.blocks.start}:{span.blocks.stop}"
            )
        wanted = span.linear_features(block).get(path)
        if wanted is None:
            raise StepError(f"adapter {lora.name}: block {block} has no linear layer {path!r}")
        given = (layer.a.shape[-1], layer.b.shape[0])
        if layer.a.ndim != 2 or layer.b.ndim != 2 or given != wanted or layer.a.shape[0] != layer.b.shape[1]:
            raise StepError(
                f"adapter {lora.name}: factors {tuple(layer.a.shape)}, {tuple(layer.b.shape)} do not fit {path} of "
                f"block {block}, which takes {wanted[0]} and gives {wanted[1]}"
            )


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Every layer of a block that multiplies by one matrix, quantised or not, by its path."""
    return {path: module for path, module in block.named_modules() if _features(module) is not None}


def linear_features(block: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of each of `linear_layers`."""
    found = {path: _features(module) for path, module in block.named_modules()}
    return {path: features for path, features in found.items() if features is not None}


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, None for other modules."""
    if type(module).__name__ == "Conv1D":  # GPT-2's, whose weight is transposed
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return None


def _read_config(directory: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory} is no PEFT adapter: cannot read {CONFIG} ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory} is no PEFT adapter: {CONFIG} is no JSON object")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"adapter {name} is {config.get('peft_type')}, only LORA can be served")
    refuse_unsupported(config, f"adapter {name}")
    return config


def refuse_unsupported(config: Mapping[str, Any], what: str) -> None:
    """Raise CheckpointError for options of a PEFT configuration that change more than a low-rank update does."""
    for option, plain in (
        ("use_dora", False),
        ("bias", "none"),
        ("modules_to_save", None),
        ("alora_invocation_tokens", None),
    ):
        if config.get(option, plain) not in (plain, None, []):
            raise CheckpointError(f"{what} uses {option}={config[option]!r}, which cannot be served")


def _read_tensors(directory: Path, name: str, blocks: range) -> dict[tuple[int, str, str], Tensor]:
    """(block, path, "A" or "B") -> factor, for `blocks` only."""
    from safetensors import SafetensorError, safe_open

    if not (directory / WEIGHTS).exists():
        hint = "; pickles are not read, save it as safetensors" if list(directory.glob("*.bin")) else ""
        raise CheckpointError(f"adapter {name} has no {WEIGHTS}{hint}")
    found: dict[tuple[int, str, str], Tensor] = {}
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                place = re.fullmatch(r"(?:[^.]+\.)*?([0-9]{1,4})\.(.+)\.lora_(A|B)\.weight", key)
                if place is None:
                    raise CheckpointError(f"adapter {name} changes {key}, which is no linear layer of a block")
                if int(place[1]) in blocks:
                    found[int(place[1]), place[2], place[3]] = file.get_tensor(key)
    except SafetensorError as error:
        raise CheckpointError(f"adapter {name}: {WEIGHTS} is damaged ({error})") from error
    return found


def _scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    """alpha / rank, with PEFT's exceptions for single layers. Raises CheckpointError for an alpha that is none."""
    alpha, patterns = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{CONFIG}: alpha_pattern is {type(patterns).__name__}, not names and numbers")
    for pattern, value in patterns.items():
        if _matches(pattern, path):
            alpha = value
    if not isinstance(alpha, int | float) or not abs(alpha) <= _MAX_ALPHA:
        raise CheckpointError(f"{CONFIG}: {str(alpha)[:40]!r} is no alpha for {path}")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _matches(pattern: str, path: str) -> bool:
    """As PEFT compares names. A repeated group could take for ever to match: `(a+)+`."""
    if len(pattern) > _MAX_PATTERN or re.search(r"\)[*+{]", pattern) or pattern.count("*") + pattern.count("+") > 4:
        raise CheckpointError(f"{CONFIG}: alpha_pattern {pattern[:40]!r} is too involved; name the layers")
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except (re.error, OverflowError) as error:
        raise CheckpointError(f"{CONFIG}: alpha_pattern {pattern[:40]!r}: {error}") from error


class Applied(threading.local):
    """What one thread's run adds to the blocks; hooks look here, since modules are shared by threads."""

    prompts: dict[int, Tensor] | None = None
    lora: Lora | None = None
    shares: Sequence[tuple[int, int, Lora]] = ()
    """Of a pass that sessions share: (first row, rows, adapter) of those that have one."""
    rows = 0
    """Of that pass."""


class LoraHook:
    """Adds the running adapters' updates to what one linear layer puts out."""

    def __init__(self, applied: Applied, block: int, path: str) -> None:
        self._applied = applied
        self._place = (block, path)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        lora = self._applied.lora
        if lora is not None:
            layer = lora.layers.get(self._place)
            return None if layer is None else output + layer(args[0]).to(output.dtype)
        updated: Tensor | None = None
        for first, rows, lora in self._applied.shares:
            layer = lora.layers.get(self._place)
            if layer is not None:
                if args[0].shape[-2] != self._applied.rows:
                    raise StepError(f"the layer {self._place[1]} is not given the rows as they are")
                updated = output.clone() if updated is None else updated
                updated.narrow(-2, first, rows).add_(layer(args[0].narrow(-2, first, rows)).to(output.dtype))
        return updated
