"""Matrices that stay in the checkpoint's own bits, and their products.

A packed matrix holds the bytes of the file: codes, and the scales that give them their value. Each class knows one
layout and has one reference dequantiser, `floats`, written from the format's specification. Products never widen a
whole matrix: they dequantise a piece that fits into the processor's cache, multiply by it, and reuse the room. For few
rows a compiled kernel reads the bytes once where there is one (backends.py).

| class | formats | a weight is |
|---|---|---|
| `Fp8Matrix` | FP8 of DeepSeek, Qwen3, GLM, compressed-tensors, FBGEMM | e4m3 * scale of its block, row or matrix |
| `NibbleMatrix` | MXFP4, GPTQ, AWQ, compressed-tensors int4, bitsandbytes nf4, fp4 | (table[code] - zero) * scale |
| `Int8Matrix` | compressed-tensors int8, bitsandbytes int8, GPTQ 8 bit | (code - zero) * scale |
| `GgmlMatrix` | GGUF Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K | as `ggml.py` says |
| `Joined` | rows of several matrices, one below the other | |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from petals.models.errors import CheckpointError
from petals.models.kernels.backends import Compiled, usable
from petals.models.kernels.ggml import GGML_TYPES, dequantise_rows

_PIECE = 1 << 18
"""Weights that are dequantised at a time on a CPU: as float32 they stay in its cache."""
_PIECE_ELSEWHERE = 1 << 26
_SCALES = {
    torch.uint8: "uint8",
    torch.float16: "uint16",
    torch.bfloat16: "int16",
    torch.float32: "float32",
}
"""Dtypes of scales, as the kernels see them."""
_E4M3_TO_HALF = 256.0
"""An e4m3 byte's seven low bits, moved to a float16's, are a value that is this many times too small: the exponents'
biases differ by 8. That holds for subnormal values, too."""


class Packed(ABC):
    """A frozen matrix (out, in) in fewer bytes."""

    shape: tuple[int, int]

    @abstractmethod
    def floats(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last`, dequantised by the reference: (last - first, in) float32."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds."""

    @abstractmethod
    def narrow(self, first: int, last: int) -> Packed:
        """Rows `first` to `last`, sharing memory where the layout allows."""

    @abstractmethod
    def to(self, device: torch.device) -> Packed:
        """The same on `device`."""

    def _compile(self) -> Compiled | None:
        """As the compiled kernels take it (backends.py), on a CPU; None: there are none for this layout."""
        return None

    @cached_property
    def _compiled(self) -> Compiled | None:
        return self._compile() if self.device.type == "cpu" and usable() else None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All of it, (out, in); made in pieces, since a dequantiser needs room for a few copies."""
        made = torch.empty(self.shape, dtype=dtype, device=self.device)
        for first, last in self._pieces():
            made[first:last] = self.floats(first, last)
        return made

    def times(self, rows: Tensor) -> Tensor:
        """rows (..., in) @ matrix.T: (..., out) in the dtype of `rows`; no gradient."""
        flat = rows.reshape(-1, rows.shape[-1]).float()
        if self._compiled is not None:
            product = self._compiled.times(flat)
        else:
            product = flat.new_empty(len(flat), self.shape[0])
            for first, last in self._pieces():
                torch.mm(flat, self.floats(first, last).t(), out=product[:, first:last])
        return product.to(rows.dtype).view(*rows.shape[:-1], self.shape[0])

    def times_transposed(self, rows: Tensor) -> Tensor:
        """rows (..., out) @ matrix: (..., in) in the dtype of `rows`; no gradient."""
        flat = rows.reshape(-1, rows.shape[-1]).float()
        if self._compiled is not None:
            product = self._compiled.times_transposed(flat)
        else:
            product = flat.new_zeros(len(flat), self.shape[1])
            for first, last in self._pieces():
                product.addmm_(flat[:, first:last], self.floats(first, last))
        return product.to(rows.dtype).view(*rows.shape[:-1], self.shape[1])

    def _pieces(self) -> list[tuple[int, int]]:
        total, inner = self.shape
        step = max(8, (_PIECE if self.device.type == "cpu" else _PIECE_ELSEWHERE) // max(1, inner))
        return [(first, min(first + step, total)) for first in range(0, total, step)]


class Fp8Matrix(Packed):
    """e4m3 codes with scales in blocks of rows and columns; the last blocks may be cut off by the matrix's edge."""

    def __init__(self, codes: Tensor, scale: Tensor, block: tuple[int, int], skipped: int = 0) -> None:
        """codes (out, in) float8_e4m3fn; scale (row blocks, column blocks) float32. `skipped`: rows of the first block
        that belong to another matrix.

        Raises: CheckpointError for codes that are no numbers, or scales that do not cover the matrix.
        """
        self.shape = (len(codes), codes.shape[1])
        covered = scale.shape[0] * block[0] - skipped, scale.shape[1] * block[1]
        if covered[0] < self.shape[0] or covered[1] < self.shape[1]:
            raise CheckpointError(f"scales {tuple(scale.shape)} of {block} weights do not cover a matrix {self.shape}")
        self._codes = codes
        self._scale = scale
        self._block = block
        self._skipped = skipped

    def floats(self, first: int, last: int) -> Tensor:
        codes = self._codes[first:last]
        if codes.device.type == "cpu":  # 15 times as fast as the conversion of torch 2.13, and exactly the same
            bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-16512)
            wide = bits.view(torch.float16).to(torch.float32).mul_(_E4M3_TO_HALF)
        else:
            wide = codes.to(torch.float32)
        height, width = self._block
        begin = (self._skipped + first) // height
        scale = self._scale[begin : -(-(self._skipped + last) // height)]
        if len(scale) > 1 or height == 1:
            scale = scale.repeat_interleave(height, 0)[self._skipped + first - begin * height :][: len(wide)]
        if self.shape[1] % width == 0:
            wide.view(len(wide), -1, width).mul_(scale[..., None])
            return wide
        return wide.mul_(scale.repeat_interleave(width, 1)[:, : self.shape[1]])

    def _compile(self) -> Compiled | None:
        height, width = self._block
        if self._skipped or (1 < height < 16) or (height == 1 and self._scale.shape[1] > 1):
            return None  # the kernel for few rows scales the input for every block of rows: it would be slow
        parts = (self._codes, self._scale, height, width)
        if height > 1:
            return Compiled("fp8", self.shape, parts)
        few = (self._codes, torch.ones(1, 1), self.shape[0], width)
        return Compiled("fp8", self.shape, parts, few_parts=few, row_scale=self._scale[:, 0])

    def tensors(self) -> tuple[Tensor, ...]:
        return self._codes, self._scale

    def narrow(self, first: int, last: int) -> Packed:
        height = self._block[0]
        begin = (self._skipped + first) // height
        scale = self._scale[begin : -(-(self._skipped + last) // height)]
        return Fp8Matrix(self._codes[first:last], scale, self._block, (self._skipped + first) % height)

    def to(self, device: torch.device) -> Packed:
        return Fp8Matrix(self._codes.to(device), self._scale.to(device), self._block, self._skipped)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the 16 codes of MXFP4's elements stand for (OCP microscaling formats 1.0)."""
INTEGERS = tuple(map(float, range(16)))


class NibbleMatrix(Packed):
    """Four bits a weight: an index into a table of 16 values, with scales, and zeros, for groups of a row's weights."""

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        table: Tensor,
        *,
        zero: Tensor | None = None,
        group: int,
        order: Tensor | None = None,
    ) -> None:
        """
        Args:
            codes: (out, in / 2) uint8, of two weights the first in the low bits.
            scale: (out, groups) floating, or uint8: the exponent of a power of two plus 127 (E8M0).
            table: (16,) float32.
            zero: (out, groups), taken off the table's value; None: nothing is.
            group: weights of a group, even.
            order: (in,) int64: which of a row's inputs each weight belongs to, where groups are not neighbours.
        Raises: CheckpointError for parts that do not fit each other.
        """
        self.shape = (len(codes), 2 * codes.shape[1])
        groups = -(-self.shape[1] // group)
        if group % 2 or scale.shape != (self.shape[0], groups) or (zero is not None and zero.shape != scale.shape):
            raise CheckpointError(f"scales {tuple(scale.shape)} do not fit a matrix {self.shape} in groups of {group}")
        self._parts = (codes, scale, zero, order)
        self._table = table
        self._pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], 1).contiguous()
        self._group = group
        self._inverse = None if order is None else torch.argsort(order)

    def floats(self, first: int, last: int) -> Tensor:
        codes, scale, zero, _ = self._parts
        picked = torch.index_select(self._pairs.view(torch.float64).view(-1), 0, codes[first:last].reshape(-1).int())
        wide = picked.view(torch.float32).view(last - first, self.shape[1])
        cut = _in_groups(wide, self._group)
        if zero is not None:
            cut.sub_(zero[first:last, :, None])
        cut.mul_(_widened_scale(scale[first:last])[..., None])
        wide = cut.view(last - first, -1)[:, : self.shape[1]]
        return wide if self._inverse is None else wide[:, self._inverse]

    def _compile(self) -> Compiled | None:
        codes, scale, zero, order = self._parts
        if self.shape[1] % self._group or scale.dtype not in _SCALES:
            return None
        kind = {E2M1: "e2m1", INTEGERS: "integers"}.get(tuple(self._table.tolist()), "table")
        planes = torch.arange(self.shape[1]).view(-1, 2).t().reshape(-1)  # even inputs, then odd ones
        order = planes if order is None else order[planes]
        zeros = torch.zeros(1, 1, dtype=torch.uint8) if zero is None else zero
        parts = (codes, scale, zeros, self._table, self._group // 2)
        return Compiled(f"{kind}/{_SCALES[scale.dtype]}", self.shape, parts, order)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(part for part in (*self._parts, self._inverse) if part is not None)

    def narrow(self, first: int, last: int) -> Packed:
        codes, scale, zero, order = self._parts
        return self._like(codes[first:last], scale[first:last], None if zero is None else zero[first:last], order)

    def to(self, device: torch.device) -> Packed:
        codes, scale, zero, order = (None if part is None else part.to(device) for part in self._parts)
        return self._like(codes, scale, zero, order)

    def _like(self, codes: Any, scale: Any, zero: Any, order: Any) -> Packed:
        table = self._table.to(codes.device)
        return NibbleMatrix(codes, scale, table, zero=zero, group=self._group, order=order)


class Int8Matrix(Packed):
    """int8 codes with scales, and zeros, for groups of a row's weights."""

    def __init__(
        self, codes: Tensor, scale: Tensor, *, zero: Tensor | None = None, group: int, order: Tensor | None = None
    ) -> None:
        """codes (out, in) int8 or uint8; the rest as `NibbleMatrix` takes it."""
        self.shape = (len(codes), codes.shape[1])
        groups = -(-self.shape[1] // group)
        if scale.shape != (self.shape[0], groups) or (zero is not None and zero.shape != scale.shape):
            raise CheckpointError(f"scales {tuple(scale.shape)} do not fit a matrix {self.shape} in groups of {group}")
        self._parts = (codes, scale, zero, order)
        self._group = group
        self._inverse = None if order is None else torch.argsort(order)

    def floats(self, first: int, last: int) -> Tensor:
        codes, scale, zero, _ = self._parts
        cut = _in_groups(codes[first:last].float(), self._group)
        if zero is not None:
            cut.sub_(zero[first:last, :, None])
        cut.mul_(scale[first:last, :, None])
        wide = cut.view(last - first, -1)[:, : self.shape[1]]
        return wide if self._inverse is None else wide[:, self._inverse]

    def _compile(self) -> Compiled | None:
        codes, scale, zero, order = self._parts
        if self.shape[1] % self._group or scale.dtype not in _SCALES:
            return None
        kind = "int8" if codes.dtype == torch.int8 else "uint8"
        zeros = torch.zeros(1, 1, dtype=torch.uint8) if zero is None else zero
        parts = (codes.view(torch.uint8), scale, zeros, 0, self._group)
        return Compiled(f"{kind}/{_SCALES[scale.dtype]}", self.shape, parts, order)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(part for part in (*self._parts, self._inverse) if part is not None)

    def narrow(self, first: int, last: int) -> Packed:
        codes, scale, zero, order = self._parts
        part = None if zero is None else zero[first:last]
        return Int8Matrix(codes[first:last], scale[first:last], zero=part, group=self._group, order=order)

    def to(self, device: torch.device) -> Packed:
        codes, scale, zero, order = (None if part is None else part.to(device) for part in self._parts)
        assert codes is not None
        assert scale is not None
        return Int8Matrix(codes, scale, zero=zero, group=self._group, order=order)


class GgmlMatrix(Packed):
    """Blocks of a GGUF file, as they are there."""

    def __init__(self, blocks: Tensor, kind: str) -> None:
        """blocks (out, bytes of a row) uint8; kind: a name of `GGML_TYPES`."""
        weights, nbytes = GGML_TYPES[kind]
        self.shape = (len(blocks), blocks.shape[1] // nbytes * weights)
        self.kind = kind
        self._blocks = blocks

    def floats(self, first: int, last: int) -> Tensor:
        return dequantise_rows(self._blocks[first:last], self.kind)

    def _compile(self) -> Compiled | None:
        run = 16 if self.kind in ("Q4_0", "Q4_1", "Q6_K") else 32
        return Compiled(self.kind, self.shape, (self._blocks, run))

    def tensors(self) -> tuple[Tensor, ...]:
        return (self._blocks,)

    def narrow(self, first: int, last: int) -> Packed:
        return GgmlMatrix(self._blocks[first:last], self.kind)

    def take(self, rows: Tensor) -> Packed:
        """These rows, in this order."""
        return GgmlMatrix(self._blocks[rows], self.kind)

    def to(self, device: torch.device) -> Packed:
        return GgmlMatrix(self._blocks.to(device), self.kind)


class Joined(Packed):
    """Matrices of equal width, one below the other."""

    def __init__(self, parts: Sequence[Packed]) -> None:
        if len({part.shape[1] for part in parts}) != 1:
            raise CheckpointError(f"matrices {', '.join(str(part.shape) for part in parts)} cannot be joined")
        self._joined = tuple(parts)
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])

    def floats(self, first: int, last: int) -> Tensor:
        return torch.cat([part.floats(begin, end) for part, begin, end in self._within(first, last)])

    def times(self, rows: Tensor) -> Tensor:
        return torch.cat([part.times(rows) for part in self._joined], -1)

    def times_transposed(self, rows: Tensor) -> Tensor:
        shares = torch.split(rows, [part.shape[0] for part in self._joined], -1)
        products = [part.times_transposed(share) for part, share in zip(self._joined, shares, strict=True)]
        return torch.stack(products).sum(0)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self._joined for tensor in part.tensors())

    def narrow(self, first: int, last: int) -> Packed:
        return Joined([part.narrow(begin, end) for part, begin, end in self._within(first, last)])

    def to(self, device: torch.device) -> Packed:
        return Joined([part.to(device) for part in self._joined])

    def _within(self, first: int, last: int) -> list[tuple[Packed, int, int]]:
        found, begin = [], 0
        for part in self._joined:
            end = begin + part.shape[0]
            if begin < last and first < end:
                found.append((part, max(first, begin) - begin, min(last, end) - begin))
            begin = end
        return found


def _in_groups(wide: Tensor, group: int) -> Tensor:
    """(rows, in) -> (rows, groups, group); a last group that is not full is filled up with zeros."""
    short = -wide.shape[1] % group
    if short:
        wide = torch.nn.functional.pad(wide, (0, short))
    return wide.view(len(wide), -1, group)


def _widened_scale(scale: Tensor) -> Tensor:
    """float32. An E8M0 byte is the exponent of one, but for 0, which is 2**-127, and 255, which is no number."""
    if scale.dtype != torch.uint8:
        return scale.float()
    bits = (scale.to(torch.int32) << 23).masked_fill_(scale == 0, 1 << 22)
    return bits.view(torch.float32)
