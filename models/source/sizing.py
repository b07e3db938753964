"""How many bytes blocks take in memory, before they are loaded: from the headers of the files that are here, else from
the configuration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from petals.models.blocks.assemble import EXPERTS, can_halve_for
from petals.models.kernels.float16_weights import HALVED
from petals.models.source.checkpoint import Checkpoint
from petals.models.source.loading import skeleton_blocks
from petals.models.source.sources import block_sources

BYTES_PER_WEIGHT = {"int8": 1.02, "nf4": 0.57}
"""Of matrices, scales included."""
_SCHEME_BYTES = {"fp8": 1.01, "fbgemm_fp8": 1.01, "gguf": 1.0}
_SCHEME_BYTES_OTHERWISE = 0.6
"""Of matrices of a quantised checkpoint whose files are not here: 4 bits with scales for groups of 32."""
_FLOAT32_COPIES = 2
"""Of the matrix that is being loaded, as float32, at once: itself, and half of one as it was read and as it is kept."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of blocks in memory."""

    kept: tuple[int, ...]
    """Of each block's weights."""
    matrix: int
    """Weights of the largest matrix: how much room loading and dequantising need beside them."""

    @property
    def largest(self) -> int:
        """Of the largest block."""
        return max(self.kept)

    @property
    def loading(self) -> int:
        """Beyond what is kept, while one matrix after another is made."""
        return _FLOAT32_COPIES * 4 * self.matrix


def sizes_of(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, quant_type: str = "none") -> Sizes:
    """Of all blocks, as `load_span` keeps them. No weights are read, no files fetched.

    Raises: CheckpointError for damaged files.
    """
    keeping = _Kept(checkpoint, dtype, device, quant_type)
    if all(checkpoint.has(name for name, _ in checkpoint.block_tensors(b)) for b in range(checkpoint.num_blocks)):
        found = [keeping.from_headers(block) for block in range(checkpoint.num_blocks)]
    else:
        found = [keeping.from_skeleton(layer) for layer in skeleton_blocks(checkpoint.config)]
    return Sizes(tuple(kept for kept, _ in found), max(matrix for _, matrix in found))


class _Kept:
    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, quant_type: str) -> None:
        self._checkpoint = checkpoint
        self._floating = dtype.itemsize
        halved = checkpoint.dtype.itemsize == 2 and can_halve_for(dtype, device)
        self._matrix = 2.0 if halved else float(dtype.itemsize)
        if quant_type != "none":
            self._matrix = BYTES_PER_WEIGHT[quant_type]
        self._own_bits = quant_type == "none"

    def from_headers(self, block: int) -> tuple[int, int]:
        """Bytes, and weights of the largest matrix."""
        sources = block_sources(self._checkpoint, block)
        stored = {name: self._checkpoint.entry(name) for name, _ in self._checkpoint.block_tensors(block)}
        total, matrix = 0.0, 0
        for source in sources.values():
            weights = math.prod(source.shape)
            matrix = max(matrix, math.prod(source.shape[-2:]))
            if source.packed is not None and self._own_bits:
                total += sum(stored[part].nbytes for part in source.parts)
            elif not source.dtype.is_floating_point:
                total += weights * source.dtype.itemsize
            else:
                total += weights * (self._matrix if len(source.shape) > 1 else self._floating)
        return int(total), matrix

    def from_skeleton(self, layer: nn.Module) -> tuple[int, int]:
        """The same."""
        scheme, total, matrix = self._checkpoint.scheme, 0.0, 0
        per_weight = self._matrix
        if scheme is not None and self._own_bits:
            per_weight = _SCHEME_BYTES.get(scheme.format.method, _SCHEME_BYTES_OTHERWISE)
        for module in layer.modules():
            packs = type(module) in HALVED or EXPERTS.search(type(module).__name__) is not None
            for weight in module.parameters(recurse=False):
                matrix = max(matrix, math.prod(weight.shape[-2:]))
                total += weight.numel() * (per_weight if packs and weight.ndim > 1 else self._floating)
        return int(total), matrix
