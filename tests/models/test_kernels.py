"""Compiled products against the reference dequantisers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from petals.models.kernels import backends
from petals.models.kernels.ggml import GGML_TYPES
from petals.models.kernels.packed import E2M1, INTEGERS, Fp8Matrix, GgmlMatrix, Int8Matrix, Joined, NibbleMatrix, Packed
from petals.models.kernels.quantize import NF4
from tests.models.test_gguf import blocks

pytestmark = pytest.mark.skipif(not backends.usable(), reason="numba is not installed")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator())


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=generator()) + 0.1


def floating(out: int, width: int) -> Tensor:
    return torch.randn(out, width, generator=generator()).to(torch.float8_e4m3fn)


def _ggml(kind: str) -> Packed:
    import numpy as np

    return GgmlMatrix(torch.from_numpy(blocks(kind, (70, 512), np.random.default_rng(2))), kind)


def _nibbles(table: tuple[float, ...], scale: Tensor, zero: Tensor | None = None, group: int = 32) -> Packed:
    order = torch.randperm(256, generator=generator()) if zero is not None else None
    return NibbleMatrix(codes(70, 128), scale, torch.tensor(table), zero=zero, group=group, order=order)


MATRICES: dict[str, Callable[[], Packed]] = {
    "fp8 in blocks": lambda: Fp8Matrix(floating(300, 200), scales(3, 2), (128, 128)),
    "fp8 in rows": lambda: Fp8Matrix(floating(70, 200), scales(70, 1), (1, 200)),
    "fp8 with one scale": lambda: Fp8Matrix(floating(70, 200), scales(1, 1), (70, 200)),
    "fp8 cut off": lambda: Fp8Matrix(floating(300, 200), scales(3, 2), (128, 128)).narrow(100, 250),
    "mxfp4": lambda: _nibbles(E2M1, torch.randint(0, 130, (70, 8), dtype=torch.uint8, generator=generator())),
    "int4, float16": lambda: _nibbles(INTEGERS, scales(70, 8).half(), codes(70, 8) & 15),
    "int4, bfloat16": lambda: _nibbles(INTEGERS, scales(70, 2).bfloat16(), codes(70, 2) & 15, 128),
    "nf4": lambda: _nibbles(NF4, scales(70, 4), group=64),
    "int8": lambda: Int8Matrix(codes(70, 96).view(torch.int8), scales(70, 3), group=32),
    "uint8": lambda: Int8Matrix(codes(70, 96), scales(70, 3).half(), zero=codes(70, 3), group=32),
    **{kind: lambda kind=kind: _ggml(kind) for kind in GGML_TYPES},  # type: ignore[misc]
    "joined": lambda: Joined([_ggml("Q4_K"), _ggml("Q6_K")]),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 33])
@pytest.mark.parametrize("threads", [1, 2])
def test_products(name: str, rows: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_SHARE", 1)
    torch.set_num_threads(threads)
    matrix = MATRICES[name]()
    out, width = matrix.shape
    wide = matrix.dequantised().double()
    given, back = (torch.randn(2, rows, size, generator=generator()) for size in (width, out))
    for ours, theirs in (
        (matrix.times(given), given.double() @ wide.t()),
        (matrix.times_transposed(back), back.double() @ wide),
    ):
        assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert matrix.times(given.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", MATRICES)
def test_pieces_give_the_same(name: str) -> None:
    """What is done where numba is not installed."""
    matrix, other = MATRICES[name](), MATRICES[name]()
    for part in getattr(other, "_joined", [other]):
        part.__dict__["_compiled"] = None
    given = torch.randn(5, matrix.shape[1], generator=generator())
    back = torch.randn(5, matrix.shape[0], generator=generator())
    limit = 1e-5 * float(matrix.times(given).abs().max())
    assert_close(other.times(given), matrix.times(given), rtol=1e-5, atol=limit)
    limit = 1e-5 * float(matrix.times_transposed(back).abs().max())
    assert_close(other.times_transposed(back), matrix.times_transposed(back), rtol=1e-5, atol=limit)


def test_a_matrix_can_be_cut_and_moved() -> None:
    for make in MATRICES.values():
        matrix = make()
        assert torch.equal(matrix.narrow(5, 40).dequantised(), matrix.dequantised()[5:40])
        assert torch.equal(matrix.to(torch.device("cpu")).dequantised(), matrix.dequantised())
        assert matrix.nbytes == sum(tensor.nbytes for tensor in matrix.tensors())


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALS_NO_KERNELS", "1")
    assert not backends.available()
