"""Products with packed matrices, compiled where numba is installed.

A decode step is bound by reading weights. torch has no products for most packed formats, and dequantising a piece with
its operations passes over the piece several times. These kernels read each byte once. For few rows of the input, a row
of the matrix is decoded into a buffer that stays in the first cache, and multiplied by all of them. For many, a piece
of the matrix is decoded, and multiplied by torch.

They are written in Python (compiled.py); numba, which has wheels for every platform, compiles them for the machine when
they are first used, a second for each format. Sums are float32's, in an order of their own. Without numba, or on other
devices, a matrix is dequantised in pieces by its reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

FEW_ROWS = 8
"""Above this many a piece that is decoded once for all rows is faster."""
_PIECE = 1 << 18
"""Weights that are decoded at a time for many rows: a megabyte of float32."""
_SHARE = 1 << 18
"""Weights that are worth a thread."""
_OFF = "PETALS_NO_KERNELS"
"""An environment variable: dequantise in pieces whatever is installed."""


def available() -> bool:
    """Whether numba is installed; it is not imported."""
    return not os.environ.get(_OFF) and find_spec("numba") is not None


class Compiled:
    """A packed matrix as the kernels see it: its kind, and arrays that share its memory."""

    def __init__(
        self,
        kind: str,
        shape: tuple[int, int],
        parts: tuple[Any, ...],
        order: Tensor | None = None,
        *,
        few_parts: tuple[Any, ...] | None = None,
        row_scale: Tensor | None = None,
    ) -> None:
        """
        Args:
            kind: a name that compiled.py knows.
            parts: tensors on the CPU, and numbers, as that kernel takes them.
            order: (in,) int64: which input each weight of a decoded row belongs to; None: in turn.
            few_parts: other parts for few rows, whose products are multiplied by `row_scale` (out,) afterwards.
        """
        self._few, self._unpack = _compiled(kind)
        self._shape = shape
        self._parts = _arrays(parts)
        self._few_parts = self._parts if few_parts is None else _arrays(few_parts)
        self._row_scale = row_scale
        self._order = order

    def times(self, rows: Tensor) -> Tensor:
        """rows (rows, in) float32 times the matrix: (rows, out) float32."""
        if self._order is not None:
            rows = rows[:, self._order]
        out, width = self._shape
        product = torch.empty(len(rows), out)
        if len(rows) <= FEW_ROWS:
            given, into = rows.contiguous().numpy(), product.numpy()
            _share_out(out, width, lambda first, last: self._few(given, into, first, last, self._few_parts))
            return product if self._row_scale is None else product.mul_(self._row_scale)
        step = max(8, _PIECE // width)
        buffer = torch.empty(step, width)
        for begin in range(0, out, step):
            piece = buffer[: min(step, out - begin)]
            self._decode(piece, begin)
            torch.mm(rows, piece.t(), out=product[:, begin : begin + len(piece)])
        return product

    def times_transposed(self, rows: Tensor) -> Tensor:
        """rows (rows, out) float32 times the matrix, the other way round: (rows, in) float32."""
        out, width = self._shape
        product = torch.zeros(len(rows), width)
        step = max(8, _PIECE // width)
        buffer = torch.empty(step, width)
        for begin in range(0, out, step):
            piece = buffer[: min(step, out - begin)]
            self._decode(piece, begin)
            product.addmm_(rows[:, begin : begin + len(piece)], piece)
        if self._order is None:
            return product
        return torch.empty_like(product).index_copy_(1, self._order, product)

    def _decode(self, piece: Tensor, begin: int) -> None:
        into = piece.numpy()
        _share_out(
            len(piece),
            self._shape[1],
            lambda first, last: self._unpack(into[first:last], begin + first, begin + last, self._parts),
        )


_KNOWN = {torch.float16: torch.uint16, torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}


def _arrays(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same memory, in dtypes that numba knows: float16 as uint16, bfloat16 as int16."""
    return tuple(
        np.ascontiguousarray(part.view(_KNOWN.get(part.dtype, part.dtype)).numpy())
        if isinstance(part, Tensor)
        else part
        for part in parts
    )


def _share_out(rows: int, width: int, work: Callable[[int, int], None]) -> None:
    """Each thread does its share of the rows; the calling one, too."""
    threads = min(torch.get_num_threads(), max(1, rows * width // _SHARE))
    if threads == 1:
        work(0, rows)
        return
    step = -(-rows // threads)
    edges = [(first, min(first + step, rows)) for first in range(0, rows, step)]
    helpers = [_pool().submit(work, first, last) for first, last in edges[1:]]
    work(*edges[0])
    for helper in helpers:
        helper.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "petals-kernels")


@cache
def _compiled(kind: str) -> tuple[Callable[..., None], Callable[..., None]]:
    from petals.models.kernels.compiled import kernels

    return kernels(kind)


@cache
def usable() -> bool:
    """Whether kernels can be compiled here: numba may be there, and not work with this Python or numpy."""
    if not available():
        return False
    try:
        import petals.models.kernels.compiled  # noqa: F401  # to see whether it can be
    except Exception:  # its own errors, and those of LLVM's library
        return False
    return True
