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
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from petals.models.errors import UnsupportedModel

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


def quantize_block(block: nn.Module, quant_type: str, device: torch.device) -> nn.Module:
    """Replace every linear layer and every stack of experts of a block, in place, and move the block to `device`.

    Raises: UnsupportedModel when bitsandbytes is needed and not installed.
    """
    check_quant_type(quant_type)
    if quant_type == "none":
        return block.to(device)
    for name, module in list(block.named_modules()):
        if not isinstance(module, (nn.Linear, Conv1D)):
            _quantize_experts(module, quant_type, device)
            continue
        parent_name, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent_name), leaf, _quantized(module, quant_type, device))
    return block.to(device)


def _quantize_experts(module: nn.Module, quant_type: str, device: torch.device) -> None:
    """Keep a module's stacked matrices (experts, out, in), which `transformers` fuses experts into, in fewer bytes.

    The library multiplies by them as it likes, so what it reads is dequantised on every access, all experts at once:
    the memory of one block's experts comes back for as long as that block runs.
    """
    for name, weight in list(module.named_parameters(recurse=False)):
        if weight.ndim != 3 or not weight.is_floating_point():
            continue
        if quant_type == "int8":
            integers, scale = quantize_rows(weight.flatten(0, 1))
            setattr(module, name, nn.Parameter(integers.view_as(weight), requires_grad=False))
            parametrize.register_parametrization(module, name, _Int8Experts(scale, weight.dtype), unsafe=True)
        else:
            _import_bitsandbytes(quant_type, device)
            from bitsandbytes.nn.parametrize import replace_parameter_4bit

            module.to(device)
            replace_parameter_4bit(module, name, quant_type="nf4")


def quantize_head(linear: nn.Linear) -> nn.Module:
    """A language model's frozen head in int8, on a CPU. The weights of `linear` stay as they are: they may also be the
    embeddings.

    Raises: UnsupportedModel on another device.
    """
    if linear.weight.device.type != "cpu":
        raise UnsupportedModel(f"a head in int8 is for CPUs, this one is on {linear.weight.device}")
    return _Int8Head(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


class _Int8Experts(nn.Module):
    """Reads int8 (experts, out, in) as floating: a parametrization of the stacked matrices."""

    scale: Tensor

    def __init__(self, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("scale", scale)

    def forward(self, integers: Tensor) -> Tensor:
        """What is read."""
        return dequantize_rows(integers.flatten(0, 1), self.scale, self.dtype).view_as(integers)


def _quantized(module: nn.Linear | Conv1D, quant_type: str, device: torch.device) -> nn.Module:
    weight = module.weight.detach()
    weight = weight.t().contiguous() if isinstance(module, Conv1D) else weight
    bias = None if module.bias is None else module.bias.detach()
    if quant_type == "int8" and device.type == "cpu":
        return Int8Linear(weight, bias)
    return _bitsandbytes_linear(weight, bias, quant_type, device)


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
