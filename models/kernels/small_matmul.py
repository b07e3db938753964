"""Products of few rows with a frozen matrix: what decoding spends its time on.

One row times a matrix is bound by reading the matrix, and how fast a library reads depends on the machine. On some, the
stock matrix-vector product uses one core of two, and seeing the matrix (without a copy) as as many shorter ones as
there are threads reaches 30 of 35 GB/s instead of 17; on others it reaches the memory's speed by itself, but for 4 to
16 rows multiplying the other way round, matrix times rows, takes two thirds of the time. So the ways are measured, once
per process for each shape and number of rows. For one row all give the same bits; for several they agree to rounding;
who needs the same bits from every process does without.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petals.models.kernels.float16_weights import HalfLinear, HalfMatrix, halve
from petals.models.kernels.packed_layers import PackedLinear
from petals.models.kernels.quantize import Int8Linear, int8_product
from petals.models.kernels.threads import ThreadChoices

FEW_ROWS = 64
"""Above this many rows a product is bound by arithmetic, and the stock one uses every core."""

Way = Callable[[Tensor, Tensor], Tensor]
"""x (rows, in), weight (out, in) -> (rows, out)."""


def _in_parts(x: Tensor, weight: Tensor) -> Tensor:
    """Each thread multiplies by its share of the weight's rows."""
    parts = torch.get_num_threads()
    out_features, in_features = weight.shape
    shares = weight.view(parts, out_features // parts, in_features).transpose(1, 2)
    return torch.bmm(x.expand(parts, *x.shape), shares).transpose(0, 1).reshape(len(x), out_features)


def _other_way_round(x: Tensor, weight: Tensor) -> Tensor:
    return (weight @ x.t()).t()


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, alike: Sequence[Tensor] = ()) -> Tensor:
    """x (rows, in) @ weight (out, in).T + bias, the way that is fastest for these shapes on this machine.

    `alike`: weights of the same shape that are used in turn with this one, to measure with.
    """
    rows = len(x)
    rounds_twice = bias is not None and x.dtype != torch.float32  # a product, then its sum: it shows in half precision
    if rows > FEW_ROWS or weight.device.type != "cpu" or rounds_twice:
        return F.linear(x, weight, bias)
    out_features, in_features = weight.shape
    key = (
        rows if rows <= 4 else 1 << (rows - 1).bit_length(),
        out_features,
        in_features,
        weight.dtype,
        torch.get_num_threads(),
    )
    way = _FASTEST.get(key) or _FASTEST.setdefault(key, _fastest(key[0], alike or [weight]))
    if way is F.linear:
        return F.linear(x, weight, bias)
    product = way(x, weight)
    return product if bias is None else product + bias


_SAMPLE_BYTES = 48 << 20
"""Weights come from memory when a model decodes, so as many are multiplied by as no cache holds."""
_ROUNDS = 3
_WORTH = 0.93
"""A way must take less than this of the stock product's time, so that noise alone changes nothing."""


_FASTEST: dict[tuple[int, int, int, torch.dtype, int], Way] = {}
"""By rows (from 5 on rounded up to a power of two), features out and in, dtype, threads."""


def _fastest(rows: int, weights: Sequence[Tensor]) -> Way:
    """Measure which way to multiply that many rows by these matrices, one after another."""
    weights = weights[: max(1, _SAMPLE_BYTES // weights[0].nbytes)]
    out_features, in_features = weights[0].shape
    ways: list[Way] = [F.linear, _other_way_round]
    threads = torch.get_num_threads()
    if threads > 1 and out_features % threads == 0:
        ways.append(_in_parts)
    with torch.inference_mode():
        x = torch.full((rows, in_features), 0.1, dtype=weights[0].dtype)
        for way in ways:
            _seconds(way, x, weights)
        rounds = [[_seconds(way, x, weights) for way in ways] for _ in range(_ROUNDS)]
    stock, *others = (median(times) for times in zip(*rounds, strict=True))
    best = min(others)
    return ways[1 + others.index(best)] if best < _WORTH * stock else F.linear


def _seconds(way: Way, x: Tensor, weights: Sequence[Tensor]) -> float:
    started = time.perf_counter()
    for weight in weights:
        way(x, weight)
    return time.perf_counter() - started


Product = Callable[[Tensor], Tensor]
"""x (rows, in) -> (rows, out), with a frozen weight."""


@dataclass(frozen=True, slots=True, eq=False)
class DenseProduct:
    """A floating weight (out, in), and a bias (out,) or None; `alike`: as in `dense_product`; None: the stock way."""

    weight: Tensor
    bias: Tensor | None
    alike: Sequence[Tensor] | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.alike is None:
            return F.linear(x, self.weight, self.bias)
        return dense_product(x, self.weight, self.bias, self.alike)


def calibrate(products: Iterable[Product]) -> None:
    """Find the fastest ways for these now, while the machine is quiet, rather than when they are first needed."""
    with torch.inference_mode():
        for product in products:
            if isinstance(product, DenseProduct):
                for rows in (1, 2, 3, 4, 8, 16, 32, 64):
                    product(product.weight.new_zeros(rows, product.weight.shape[1]))


@dataclass(frozen=True, slots=True, eq=False)
class Int8Product:
    """int8 weight (out, in), bfloat16 scale (out,), and a bias (out,) or None."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        product = int8_product(x, self.weight, self.scale)
        return product if self.bias is None else product.add_(self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class HalfProduct:
    """Matrices in half the bytes (float16_weights.py), outputs side by side. Not stacked: FBGEMM's layout has no
    views."""

    matrices: tuple[HalfMatrix, ...]

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.matrices) == 1:
            return self.matrices[0].times(x)
        return torch.cat([matrix.times(x) for matrix in self.matrices], -1)


@dataclass(frozen=True, slots=True, eq=False)
class PackedProduct:
    """Matrices in other bits (packed_layers.py) and their biases, outputs side by side."""

    layers: tuple[PackedLinear, ...]

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.layers) == 1:
            return self.layers[0](x)  # type: ignore[no-any-return]
        return torch.cat([layer(x) for layer in self.layers], -1)


Samples = defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]]
"""The weights of a span by shape and dtype, in the order of their use."""


def fuse(linears: Sequence[nn.Module], samples: Samples | None) -> Product | None:
    """One product for layers that share their input, outputs side by side; None when they can not be fused.

    The layers go on working, and no memory is added: their weights become views of the stacked one. A floating weight
    enters `samples`; None: it is always multiplied by the stock way.
    """
    if all(type(layer) is nn.Linear for layer in linears):
        weight, bias = _stack(linears, "weight"), _stack(linears, "bias")
        if weight is None:
            return None
        alike = None if samples is None else samples[weight.shape, weight.dtype]
        if alike is not None:
            alike.append(weight)
        return DenseProduct(weight, bias, alike)
    halves = [layer.matrix for layer in linears if isinstance(layer, HalfLinear)]
    if len(halves) == len(linears):
        return HalfProduct(tuple(halves))
    packed = [layer for layer in linears if isinstance(layer, PackedLinear)]
    if len(packed) == len(linears):
        return PackedProduct(tuple(packed))
    if all(isinstance(layer, Int8Linear) for layer in linears):
        weight, scale, bias = (_stack(linears, name) for name in ("weight", "scale", "bias"))
        return None if weight is None or scale is None else Int8Product(weight, scale, bias)
    return None


def _stack(layers: Sequence[Any], name: str) -> Tensor | None:
    """The layers' tensors one below the other, which they now share; None when none has any."""
    tensors: list[Tensor | None] = [getattr(layer, name) for layer in layers]
    if all(tensor is None for tensor in tensors):
        return None
    filled = [
        torch.zeros_like(layer.weight[:, 0]) if tensor is None else tensor.detach()
        for layer, tensor in zip(layers, tensors, strict=True)
    ]
    if len(filled) == 1:
        return filled[0]
    stacked = torch.cat(filled)
    begin = 0
    for tensor, part in zip(tensors, filled, strict=True):
        if tensor is not None:
            tensor.data = stacked[begin : begin + len(part)]
        begin += len(part)
    return stacked


class FewRowsLinear(nn.Linear):
    """`nn.Linear` for a language model's frozen head at the client: as fast as this machine reads it.

    In half the bytes beside the weights, which may also be the embeddings, where that loses nothing
    (float16_weights.py); made by `prepare` or when it is first used, and again when the weights have changed.
    """

    _half: tuple[tuple[int, int], HalfMatrix | None] | None = None
    """Of which weights (their address and version), and their half; None: they have none."""
    _threads: ThreadChoices | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.weight.requires_grad or (torch.is_grad_enabled() and hidden.requires_grad):
            return super().forward(hidden)
        if hidden.dtype == torch.float32 and (half := self._halved()) is not None:
            self._threads = self._threads or ThreadChoices()
            with self._threads.running(hidden.numel() // self.in_features):
                return half.times(hidden)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return dense_product(rows, self.weight, self.bias).view(*hidden.shape[:-1], -1)

    def prepare(self) -> None:
        """Halve the weights now: a second for 250,000 words of 1,024, which the first token need not wait for."""
        if self.weight.dtype == torch.float32:
            self._halved()

    def _halved(self) -> HalfMatrix | None:
        weight = self.weight
        which = (weight.data_ptr(), weight._version)
        if self._half is None or self._half[0] != which:
            self._half = (which, halve(weight.detach(), None if self.bias is None else self.bias.detach()))
        return self._half[1]
