"""How far two answers to the same question are apart, and how far honest ones may be. Pure.

Honest servers round differently: matrices of other shapes, other numbers of threads, other products chosen by
measurement. The error of a value is counted relative to the value itself or to the row's median value, whichever is
larger: a few values of a hidden state are often a thousand times the others, and in a plain norm they would hide what
is done to the rest. Of a row the root mean square counts, of an answer the worst row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from petals.protocols import messages_pb2 as pb

TOLERANCES = {("float32", "none"): 3e-4, ("float16", "none"): 6e-2, ("bfloat16", "none"): 5e-1}
"""By dtype and quantisation: several times what honest servers differ (docs/security.md has the measurements). That of
float16 follows from that of bfloat16 and its three more bits."""
QUANTISED = 5e-1
"""Rows are rounded once more, differently for one and for many."""


def tolerance_of(dtype: str, quant_type: str) -> float:
    """The largest error that is rounding, for servers that say they compute so."""
    return TOLERANCES.get((dtype, quant_type), QUANTISED)


def rounding_of(hidden: Tensor, encoding: pb.Encoding) -> Tensor | float:
    """How far each value may be from what was sent, because of how it travelled."""
    if encoding == pb.AS_FLOAT16:
        return hidden.float().abs() * 2**-11 + 2**-25
    if encoding == pb.BLOCKWISE_INT8:
        return hidden.float().abs().amax(dim=-1, keepdim=True) / 254
    return 0.0


def error_between(got: Tensor, wanted: Tensor, *, rounding: Tensor | float = 0.0, rows: Tensor | None = None) -> float:
    """How far `got` is from `wanted`, both (batch, tokens, hidden_size).

    Args:
        rounding: so much of each difference is nobody's fault.
        rows: (batch, tokens) bool, which rows count; None: all.
    """
    mine, yours = got.double(), wanted.double()
    typical = yours.abs().median(dim=-1, keepdim=True).values
    size = torch.maximum(yours.abs(), typical).clamp(min=torch.finfo(torch.float32).tiny)
    difference = ((mine - yours).abs() - rounding).clamp(min=0.0) / size
    errors = difference.square().mean(dim=-1).sqrt()
    if rows is not None:
        errors = errors[rows]
    if not errors.numel():
        return 0.0
    worst = float(errors.max())
    return worst if math.isfinite(worst) else math.inf
