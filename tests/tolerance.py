"""How far two right results may be apart: derived from what was computed, not found by trying.

A sum of n products, whatever its order, is within n * u * sum(|x| |w|) of the true one, where u is the dtype's unit
roundoff (half of its epsilon). Of a stack of blocks every output went through all their sums one after another: n is
all their lengths together, and the largest value stands for sum(|x| |w|). The sums of libraries, processors and pieces
of a prompt differ in their order only, so two right results are that close. A wrong one - a mask, a position, a missing
bias - is off by a hundredth of the largest value or more.

Symptom that this replaced: 1e-4 was allowed for values of 64 in float32, 26 units in the last place. Whole and
piecewise BLOOM prompts differ by 1.1e-4 with ATEN_CPU_CAPABILITY=default, 2.2e-4 with avx512, 3.7e-4 with avx2;
transformers' own layers differ from themselves just as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models.tiny import BLOCKS, HIDDEN

MULTIPLE = 1.0
"""Of the bound that is derived; rounding errors cancel, so a hundredth of it is usual."""


def terms_of(blocks: int, hidden: int, inner: int, tokens: int) -> int:
    """Length of all sums that follow one another: queries, attention's output, the MLP's first and second product, and
    attention over so many tokens; for each block."""
    return blocks * (3 * hidden + inner + tokens)


TINY = terms_of(BLOCKS, HIDDEN, 4 * HIDDEN, 64)
"""For the checkpoints of tests/models/tiny.py, head included."""
SMOLLM = terms_of(30, 576, 1536, 64)
"""For the default model."""


def rounding(wanted: Tensor, *, terms: int = TINY, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """What `torch.testing.assert_close` is to allow for results computed in `dtype` through sums of `terms`."""
    unit = torch.finfo(dtype).eps / 2
    largest = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    return {"rtol": 0.0, "atol": MULTIPLE * unit * terms * largest}


def assert_rounded(got: Tensor, wanted: Tensor, *, terms: int = TINY, dtype: torch.dtype = torch.float32) -> None:
    """That `got` and `wanted` are one result up to rounding."""
    torch.testing.assert_close(got, wanted, **rounding(wanted, terms=terms, dtype=dtype))
