"""The tensors of a checkpoint's blocks, quantised ones as one each, not read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from petals.models.blocks.standin import Source
from petals.models.errors import CheckpointError
from petals.models.kernels.packed import Packed
from petals.models.source.formats import PackedSource, shape_of_four_bits

if TYPE_CHECKING:
    from petals.models.source.checkpoint import Checkpoint


def block_sources(checkpoint: Checkpoint, block: int) -> dict[str, Source]:
    """By their names within the block, as they would be if nothing were quantised.

    Raises: CheckpointError for damaged or missing files, and quantised weights that lack a part.
    """
    tensors = checkpoint.block_tensors(block)
    name, rest = tensors[0]
    prefix = name.removesuffix(rest)
    found = sources_of(checkpoint, (name for name, _ in tensors))
    return {name.removeprefix(prefix): source for name, source in found.items()}


def sources_of(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Source]:
    """The same of any tensors, by their full names."""
    names = list(names)
    packed: dict[str, PackedSource] = {}
    if checkpoint.scheme is not None:
        shapes = {name: checkpoint.entry(name).shape for name in names}
        packed, names = checkpoint.scheme.sources(names, shapes)
    sources = {name: _plain(checkpoint, name) for name in names}
    for name, source in sources.items():
        if name.endswith("weight") and len(source.shape) > 1 and source.dtype in _CODES:
            raise CheckpointError(
                f"{checkpoint.name}: {name} is stored as {checkpoint.entry(name).dtype}, and nothing says how its "
                "codes become numbers: its scales, or a quantization_config in config.json, are missing"
            )
    return sources | {name: _packed(checkpoint, source) for name, source in packed.items()}


_CODES = {torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}
"""Dtypes of which a weight is not what it says."""


def _plain(checkpoint: Checkpoint, name: str) -> Source:
    entry = checkpoint.entry(name)

    def read(expert: int | None) -> Tensor:
        return checkpoint.read_stored(name, expert)

    return Source(name, entry.shape, entry.torch_dtype, None, read)


def _packed(checkpoint: Checkpoint, source: PackedSource) -> Source:
    if not source.shape:
        source = _with_shape(checkpoint, source)
    stacked = len(source.shape) == 3

    def build(expert: int | None) -> Packed:
        parts = {part: checkpoint.read_stored(name, expert if stacked else None) for part, name in source.parts.items()}
        try:
            matrix = source.build(parts)
        except (RuntimeError, ValueError, LookupError, TypeError, AssertionError) as error:
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CheckpointError(f"{checkpoint.name}: {source.name} cannot be read: {said}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.name}: {source.name}: {error}") from None
        if matrix.shape != source.shape[-2:]:
            raise CheckpointError(f"{checkpoint.name}: {source.name} is {matrix.shape}, not {source.shape[-2:]}")
        return matrix

    def refuse(expert: int | None) -> Tensor:
        return build(expert).dequantised()

    return Source(source.name, source.shape, torch.float32, build, refuse, source.flipped, tuple(source.parts.values()))


def _with_shape(checkpoint: Checkpoint, source: PackedSource) -> PackedSource:
    """bitsandbytes writes a matrix's shape not into the header, but into a tensor."""
    try:
        return replace(source, shape=shape_of_four_bits(checkpoint.read_stored(source.parts["state"])))
    except (ValueError, LookupError, TypeError):
        raise CheckpointError(f"{checkpoint.name}: {source.name} has no readable quant_state") from None
