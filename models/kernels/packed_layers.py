"""Layers of packed matrices: what takes the place of a block's linear layers and stacks of experts.

`PackedLinear` is a linear layer. `PackedExperts` is what a family's own code reads as a tensor (experts, out, in): it
takes one expert of it, and multiplies by that; so a step reads the experts that its tokens were sent to, and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Matrix(Protocol):
    """A frozen matrix (out, in), in whatever bits: packed.py, float16_weights.py, quantize.py."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int: ...

    def times(self, rows: Tensor) -> Tensor:
        """rows (..., in) @ matrix.T: (..., out)."""
        ...

    def times_transposed(self, rows: Tensor) -> Tensor:
        """rows (..., out) @ matrix: (..., in)."""
        ...

    def dequantised(self, dtype: torch.dtype = ...) -> Tensor:
        """(out, in)."""
        ...


class PackedLinear(nn.Module):
    """`nn.Linear` over a packed matrix. Frozen; passes gradients to its input."""

    bias: Tensor | None

    def __init__(self, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        """bias: (out,); dtype: of `weight`, for code that looks at it."""
        super().__init__()
        self.matrix = matrix
        self.out_features, self.in_features = matrix.shape
        self.register_buffer("bias", bias)
        self._dtype = dtype

    @property
    def weight(self) -> Tensor:
        """(out, in), made anew."""
        return self.matrix.dequantised(self._dtype)

    @property
    def weight_bytes(self) -> int:
        """Of the matrix."""
        return self.matrix.nbytes

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in) -> (..., out), dtype of `hidden`."""
        product = multiply(hidden, self.matrix, flipped=False)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedExperts(nn.Module):
    """What stands for a stacked weight (experts, out, in), or (experts, in, out) if `flipped`."""

    def __init__(self, matrices: Sequence[Matrix], flipped: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self._matrices = tuple(matrices)
        self._flipped = flipped
        self.dtype = dtype
        out, width = matrices[0].shape
        self.shape = torch.Size((len(matrices), *((width, out) if flipped else (out, width))))

    @property
    def weight_bytes(self) -> int:
        """Of all matrices."""
        return sum(matrix.nbytes for matrix in self._matrices)

    @property
    def ndim(self) -> int:
        return 3

    def __len__(self) -> int:
        return len(self._matrices)

    def __getitem__(self, expert: Any) -> Any:
        """One expert's matrix, for a product; for any other index the numbers."""
        if isinstance(expert, int) or (isinstance(expert, Tensor) and expert.ndim == 0):
            return Factor(self._matrices[int(expert)], self._flipped, self.dtype)
        return self.dequantised()[expert]

    def dequantised(self) -> Tensor:
        """All of it, in the shape that it stands for."""
        stacked = torch.stack([matrix.dequantised(self.dtype) for matrix in self._matrices])
        return stacked.transpose(1, 2) if self._flipped else stacked

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Whatever else a family does with its experts, it does with the numbers."""
        return func(*_widened(args), **_widened(kwargs or {}))


class Factor:
    """One expert's matrix where a tensor (out, in), or (in, out) if `flipped`, is expected."""

    def __init__(self, matrix: Matrix, flipped: bool, dtype: torch.dtype) -> None:
        self._matrix = matrix
        self._flipped = flipped
        self.dtype = dtype
        out, width = matrix.shape
        self.shape = torch.Size((width, out) if flipped else (out, width))

    @property
    def T(self) -> Factor:  # as tensors have it
        return Factor(self._matrix, not self._flipped, self.dtype)

    def t(self) -> Factor:
        """As of tensors."""
        return self.T

    def transpose(self, one: int, other: int) -> Factor:
        """As of tensors: of the only two dimensions."""
        return self if one % 2 == other % 2 else self.T

    def dequantised(self) -> Tensor:
        """The numbers."""
        wide = self._matrix.dequantised(self.dtype)
        return wide.t() if self._flipped else wide

    def __rmatmul__(self, rows: Tensor) -> Tensor:
        # as stored, rows (..., in) @ (out, in) would not fit: it is a product with a matrix that is the other way round
        return multiply(rows, self._matrix, flipped=not self._flipped)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = _PRODUCTS.get(func)
        if known is not None and len(args) > 1 and isinstance(args[1], Factor) and isinstance(args[0], Tensor):
            return known(*args, **(kwargs or {}))
        return func(*_widened(args), **_widened(kwargs or {}))


def _linear(rows: Tensor, factor: Factor, bias: Tensor | None = None) -> Tensor:
    product = multiply(rows, factor._matrix, flipped=factor._flipped)
    return product if bias is None else product + bias


def _matmul(rows: Tensor, factor: Factor) -> Tensor:
    return factor.__rmatmul__(rows)


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    nn.functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
}


def _widened(value: Any) -> Any:
    if isinstance(value, (PackedExperts, Factor)):
        return value.dequantised()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_widened, value))
    if isinstance(value, dict):
        return {key: _widened(each) for key, each in value.items()}
    return value


def multiply(rows: Tensor, matrix: Matrix, *, flipped: bool) -> Tensor:
    """rows (..., in) @ matrix.T, or if `flipped` rows (..., out) @ matrix; differentiable in `rows`."""
    if torch.is_grad_enabled() and rows.requires_grad:
        product: Tensor = _Product.apply(rows, matrix, flipped)  # type: ignore[no-untyped-call]
        return product
    return matrix.times_transposed(rows) if flipped else matrix.times(rows)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Matrix, flipped: bool) -> Tensor:
        ctx.matrix, ctx.flipped = matrix, flipped
        return matrix.times_transposed(rows) if flipped else matrix.times(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        matrix: Matrix = ctx.matrix
        return (matrix.times(grads[0]) if ctx.flipped else matrix.times_transposed(grads[0])), None, None
