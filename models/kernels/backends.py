"""Products of few rows with packed matrices, compiled where numba is installed.

A decode step is bound by reading weights. torch has no products for most packed formats, and dequantising a piece with
its operations passes over the piece several times. These kernels read each byte once: a row of the matrix is decoded
into a buffer that stays in the first cache, and multiplied by all rows of the input. They are written in Python; numba,
which has wheels for every platform, compiles them for the machine on first use (a second for each format, then kept in
the user's cache). Sums are float32's, in an order of their own.

Without numba, or for other devices, every function returns None, and the caller dequantises in pieces.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from petals.models.source.disk import cache_directory

FEW_ROWS = 12
"""Above this many, pieces that are dequantised once for all rows and multiplied by torch are faster."""
_OFF = "PETALS_NO_KERNELS"
"""An environment variable: dequantise in pieces whatever is installed."""


def available() -> bool:
    """Whether numba is installed; it is not imported."""
    return not os.environ.get(_OFF) and find_spec("numba") is not None


def fp8(rows: Tensor, codes: Tensor, scale: Tensor, block: tuple[int, int], skipped: int) -> Tensor | None:
    """rows (rows, in) float32 times an `Fp8Matrix`: (rows, out) float32; None: no kernel for this."""
    height, width = block
    if skipped or not _can(rows, codes) or (scale.shape[1] > 1 and height < 16):
        return None
    scales = scale if scale.shape[1] > 1 or height > 1 else scale.new_ones(1, 1)
    height = height if scale.shape[1] > 1 or height > 1 else len(codes)
    product = _run("fp8", rows, len(codes), (codes.view(torch.uint8), scales, height, width))
    return product if scales is scale else product.mul_(scale[:, 0])


def nibbles(
    rows: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor, group: int
) -> Tensor | None:
    """The same of a `NibbleMatrix`, whose inputs are in the order of its codes."""
    if not _can(rows, codes) or (2 * codes.shape[1]) % group:
        return None
    planes = torch.cat([rows[:, ::2], rows[:, 1::2]], 1)
    scale = _floats(scale)
    offset = scale.new_zeros(1, 1) if zero is None else zero.float()
    kind = _kind_of(tuple(table.tolist()))
    return _run(kind, planes, len(codes), (codes, scale, offset, table, group // 2))


def ggml(rows: Tensor, blocks: Tensor, kind: str) -> Tensor | None:
    """The same of a `GgmlMatrix`."""
    return _run(kind, rows, len(blocks), (blocks,)) if _can(rows, blocks) else None


def _can(rows: Tensor, codes: Tensor) -> bool:
    on_cpu = rows.device.type == "cpu" and codes.device.type == "cpu" and codes.is_contiguous()
    return on_cpu and 0 < len(rows) <= FEW_ROWS and _kernels() is not None


def _floats(scale: Tensor) -> Tensor:
    if scale.dtype == torch.uint8:  # exponents, see packed.py
        return (scale.to(torch.int32) << 23).masked_fill_(scale == 0, 1 << 22).view(torch.float32)
    return scale.float()


@cache
def _kind_of(table: tuple[float, ...]) -> str:
    if table == tuple(map(float, range(16))):
        return "integers"
    return (
        "e2m1"
        if table[:8] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0) and table[9:] == tuple(-value for value in table[1:8])
        else "table"
    )


def _run(kind: str, rows: Tensor, out: int, parts: tuple[Any, ...]) -> Tensor:
    """Each thread multiplies by its share of the matrix's rows."""
    kernel = _kernel(kind)
    product = torch.empty(len(rows), out)
    into, given = product.numpy(), rows.contiguous().numpy()
    arguments = tuple(part.numpy() if isinstance(part, Tensor) else part for part in parts)
    threads = min(torch.get_num_threads(), max(1, out * rows.shape[1] >> 18))
    if threads == 1:
        kernel(given, into, 0, out, arguments)
        return product
    step = -(-out // threads)
    edges = [(first, min(first + step, out)) for first in range(0, out, step)]
    helpers = [_pool().submit(kernel, given, into, first, last, arguments) for first, last in edges[1:]]
    kernel(given, into, *edges[0], arguments)
    for helper in helpers:
        helper.result()
    return product


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "petals-kernels")


@cache
def _kernel(kind: str) -> Callable[..., None]:
    kernels = _kernels()
    assert kernels is not None
    made: Callable[..., None] = kernels(kind)
    return made


@cache
def _kernels() -> Callable[[str], Callable[..., None]] | None:
    """The factory of kernels by name; None without numba."""
    if not available():
        return None
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_directory() / "numba"))
    try:
        from petals.models.kernels.compiled import kernel
    except ImportError:  # it is there, but does not work with this Python or numpy
        return None
    return kernel
