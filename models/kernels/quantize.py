"""Blocks in fewer bytes: int8 and nf4 weights, with gradients for the input.

On CUDA both are bitsandbytes'. On a CPU bitsandbytes works too, but one row of int8 takes 20-40 times as long as with
torch's own weight-only kernel; so int8 is ours there, and nf4, which torch has no kernel for, is theirs.

int8: each output row of a weight matrix is divided by its largest absolute value / 127 and rounded. Up to `_MAX_ROWS`
rows go through `torch._weight_int8pack_mm`, which wants bfloat16 rows. Above that, dequantising once and multiplying in
the rows' own dtype is faster (measured on AVX2, 2026: break-even near 32 rows). Matrices whose inner size is no
multiple of `KERNEL_LANES` are always dequantised. Scales are rounded to bfloat16 before the integers are chosen, so
that both ways multiply by exactly the same weights.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petals.models.errors import UnsupportedModel
from petals.models.kernels.packed import NibbleMatrix, Packed

QUANT_TYPES = ("none", "int8", "nf4")

_MAX_ROWS = 32
KERNEL_LANES = 16
"""torch's int8 kernel reads this many weights at a time and does not check the end of the row (torch 2.13). With an
inner size that is no multiple of it, it reads foreign memory or crashes the process."""

_PIECE_ROWS = 8192
"""Of a matrix that are quantised at a time: a head has one for each word, whose floats should not be there thrice."""


def check_quant_type(quant_type: str) -> str:
    """Raise UnsupportedModel unless it is one of QUANT_TYPES, and can be had here."""
    if quant_type not in QUANT_TYPES:
        raise UnsupportedModel(f"unknown quant_type {quant_type!r}; there are {', '.join(QUANT_TYPES)}")
    return quant_type


def quantize_linear(module: nn.Linear | Conv1D, quant_type: str, device: torch.device) -> nn.Module:
    """The layer in fewer bytes, on `device`.

    Raises: UnsupportedModel when bitsandbytes is needed and not installed.
    """
    weight = module.weight.detach()
    weight = weight.t().contiguous() if isinstance(module, Conv1D) else weight
    bias = None if module.bias is None else module.bias.detach()
    if quant_type == "int8" and device.type == "cpu":
        return Int8Linear(weight, bias)
    return _bitsandbytes_linear(weight, bias, quant_type, device)


def quantize_matrix(weight: Tensor, quant_type: str, device: torch.device) -> Int8Rows | Packed:
    """One expert's matrix (out, in) in fewer bytes, on `device`."""
    if quant_type == "int8":
        integers, scale = quantize_rows(weight)
        return Int8Rows(integers.to(device), scale.to(device))
    return nf4_matrix(weight.cpu()).to(device)


class Int8Rows:
    """A matrix (out, in) of integers with one scale for each row."""

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        """As `quantize_rows` gives them."""
        self.shape = (len(integers), integers.shape[1])
        self._integers = integers
        self._scale = scale

    @property
    def nbytes(self) -> int:
        return self._integers.nbytes + self._scale.nbytes

    def times(self, rows: Tensor) -> Tensor:
        """rows (..., in) @ matrix.T: (..., out)."""
        product = int8_product(rows.reshape(-1, rows.shape[-1]), self._integers, self._scale)
        return product.reshape(*rows.shape[:-1], self.shape[0])

    def times_transposed(self, rows: Tensor) -> Tensor:
        """rows (..., out) @ matrix: (..., in)."""
        return _wide_product(rows, self.dequantised())

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in)."""
        return dequantize_rows(self._integers, self._scale, torch.float32).to(dtype)


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The sixteen values of bitsandbytes' nf4: quantiles of a normal distribution."""
_NF4_GROUP = 64


def nf4_matrix(weight: Tensor) -> NibbleMatrix:
    """weight (out, in) in nf4: each group of a row's weights over its largest, rounded to the nearest value."""
    out, width = weight.shape
    table = torch.tensor(NF4)
    edges = (table[1:] + table[:-1]) / 2
    filled = nn.functional.pad(weight.float(), (0, -width % 2))
    groups = nn.functional.pad(filled, (0, -filled.shape[1] % _NF4_GROUP)).view(out, -1, _NF4_GROUP)
    scale = groups.abs().amax(-1)
    codes = torch.bucketize(groups / scale.clamp(min=1e-30)[..., None], edges).to(torch.uint8)
    codes = codes.view(out, -1)[:, : filled.shape[1]]
    packed = codes[:, ::2] | (codes[:, 1::2] << 4)
    return NibbleMatrix(packed, scale.half().float(), table, group=_NF4_GROUP)


def quantize_head(linear: nn.Linear) -> nn.Module:
    """A language model's frozen head in int8, on a CPU. The weights of `linear` stay as they are: they may also be the
    embeddings.

    Raises: UnsupportedModel on another device.
    """
    if linear.weight.device.type != "cpu":
        raise UnsupportedModel(f"a head in int8 is for CPUs, this one is on {linear.weight.device}")
    return _Int8Head(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


class Int8Linear(nn.Module):
    """`nn.Linear` whose weight is int8 with one scale per output row. Frozen; passes gradients to its input."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight (out, in) and bias (out,), floating."""
        super().__init__()
        integers, scale = quantize_rows(weight)
        self.out_features, self.in_features = integers.shape
        self.register_buffer("weight", integers)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in) -> (..., out), dtype of `hidden`."""
        product: Tensor = _Int8Product.apply(hidden, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Int8Head(Int8Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        """As for blocks; a family that casts what it gives its head to the head's dtype would give integers."""
        if not hidden.is_floating_point():
            raise UnsupportedModel("this model's class casts hidden states to its head's dtype; use head_quant none")
        return super().forward(hidden)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 (out, in) and bfloat16 scale (out,), so that integers * scale is near `weight` (out, in).

    The error of an element is at most half its row's scale, but for the row's largest, which rounding of the scale to
    bfloat16 may move by another 2**-9 of itself.
    """
    integers = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(len(weight), dtype=torch.bfloat16, device=weight.device)
    pieces = (torch.split(tensor, _PIECE_ROWS) for tensor in (weight, integers, scale))
    for floats, some_integers, some_scales in zip(*pieces, strict=True):
        floats = floats.float()
        some_scales.copy_((floats.abs().amax(1) / 127).clamp(min=1e-12))
        some_integers.copy_((floats / some_scales.float()[:, None]).round_().clamp_(-127, 127))
    return integers, scale


def dequantize_rows(integers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights (out, in) that `integers` and `scale` stand for."""
    return integers.to(dtype) * scale.to(dtype)[:, None]


def int8_product(rows: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    """rows (rows, in) times the weights (out, in) that `integers` and `scale` stand for, transposed."""
    if rows.shape[0] <= _MAX_ROWS and integers.shape[1] % KERNEL_LANES == 0 and integers.device.type == "cpu":
        return torch._weight_int8pack_mm(rows.to(torch.bfloat16).contiguous(), integers, scale).to(rows.dtype)
    return _wide_product(rows, dequantize_rows(integers, scale, torch.float32).t())


class _Int8Product(torch.autograd.Function):
    """hidden @ weight.T; torch's int8 kernels have no backward of their own."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(integers, scale)
        product = int8_product(hidden.reshape(-1, hidden.shape[-1]), integers, scale)
        return product.reshape(*hidden.shape[:-1], integers.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        integers, scale = ctx.saved_tensors
        (grad,) = grads
        rows = grad.reshape(-1, grad.shape[-1])
        product = _wide_product(rows, dequantize_rows(integers, scale, torch.float32))
        return product.reshape(*grad.shape[:-1], integers.shape[1]), None, None


def _wide_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """In float32 whatever the rows are: a CPU without bfloat16 units takes six times as long for bfloat16."""
    return (rows.float() @ matrix).to(rows.dtype)


def _bitsandbytes_linear(weight: Tensor, bias: Tensor | None, quant_type: str, device: torch.device) -> nn.Module:
    """A bitsandbytes layer with these weights, quantised on its way to `device`."""
    out_features, in_features = weight.shape
    bnb = _import_bitsandbytes(quant_type, device)
    layer: nn.Module
    if quant_type == "int8":
        layer = bnb.Linear8bitLt(in_features, out_features, bias=bias is not None, has_fp16_weights=False)
        layer.weight = bnb.Int8Params(weight.half().cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.Linear4bit(
            in_features, out_features, bias=bias is not None, compute_dtype=weight.dtype, quant_type="nf4"
        )
        layer.weight = bnb.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to(device)


def _import_bitsandbytes(quant_type: str, device: torch.device) -> Any:
    """`bitsandbytes.nn`, imported when needed, since it takes seconds."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line per call on a CPU, one at import
    try:
        from bitsandbytes import nn as bnb_nn
    except ImportError:
        raise UnsupportedModel(
            f"quant_type {quant_type} on {device.type} needs bitsandbytes: pip install petals-libp2p[quant]"
        ) from None
    return bnb_nn
