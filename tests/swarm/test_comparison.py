"""What counts as rounding, and what can not hide behind it."""

from __future__ import annotations

import math

import pytest
import torch

from petals.models.source.loading import load_span
from petals.peer.client.audit.comparison import error_between, rounding_of, tolerance_of
from petals.protocols import messages_pb2 as pb
from petals.protocols.tensors import travelled
from tests.swarm.conftest import Truth


def answer(seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """With one value that is a thousand times the others, as real models have them."""
    hidden = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(seed))
    hidden[..., 7] = 1000.0
    return scale * hidden


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_an_error_has_no_unit(scale: float) -> None:
    right = answer(scale=scale)
    assert error_between(1.01 * right, right) == pytest.approx(0.01, rel=0.7)
    assert error_between(right, right) == 0.0


def test_large_values_hide_nothing() -> None:
    right = answer()
    wrong = right.clone()
    wrong[1, 2, 8:] += 0.05 * torch.randn(56, generator=torch.Generator().manual_seed(1))
    assert float((wrong - right).norm() / right.norm()) < 3e-4  # where a plain norm would see nothing
    assert error_between(wrong, right) > 0.02


def test_one_bad_row_among_good_ones_counts_unless_it_is_padding() -> None:
    right, wrong = answer(), answer()
    wrong[0, 1] = answer(seed=2)[0, 1]
    rows = torch.ones(2, 3, dtype=torch.bool)
    assert error_between(wrong, right, rows=rows) > 0.5
    rows[0, 1] = False
    assert error_between(wrong, right, rows=rows) == 0.0
    assert error_between(wrong, right, rows=torch.zeros(2, 3, dtype=torch.bool)) == 0.0


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", ["its", "ours"])
def test_what_is_no_number_is_as_wrong_as_can_be(nonsense: float, whose: str) -> None:
    one, other = answer(), answer()
    one[0, 0, 0] = nonsense
    assert error_between(*((one, other) if whose == "its" else (other, one))) == math.inf


@pytest.mark.parametrize("encoding", [pb.RAW, pb.AS_FLOAT16, pb.BLOCKWISE_INT8])
def test_what_the_way_has_done_is_nobodys_fault(encoding: pb.Encoding) -> None:
    right = answer()
    arrived = travelled(right, encoding)
    assert error_between(arrived, right, rounding=rounding_of(arrived, encoding)) < 1e-6
    if encoding != pb.BLOCKWISE_INT8:  # whose steps are as large as the small values here
        assert error_between(0.98 * arrived, right, rounding=rounding_of(arrived, encoding)) > 0.005


@pytest.mark.parametrize("tiny_truth", ["llama"], indirect=True)
def test_honest_answers_are_close_and_a_cheaper_precision_is_not(tiny_truth: Truth) -> None:
    """One by one, as a prompt, by the library's own layers: a tenth of the tolerance at most; int8 is beyond it."""
    hidden = torch.randn(1, 24, tiny_truth.checkpoint.hidden_size, generator=torch.Generator().manual_seed(3))

    def outputs(quant_type: str, boundaries: list[int]) -> torch.Tensor:
        span = load_span(tiny_truth.checkpoint, range(4), quant_type=quant_type)
        cache = span.new_cache(span.blocks, 1, 24)
        pieces = zip([0, *boundaries[:-1]], boundaries, strict=True)
        with torch.inference_mode():
            return torch.cat([span.step(hidden[:, begin:end], cache) for begin, end in pieces], dim=1)

    tolerance = tolerance_of("float32", "none")
    whole, single, cheap = outputs("none", [24]), outputs("none", [*range(1, 25)]), outputs("int8", [24])
    assert error_between(single, whole) < tolerance / 10
    for token in range(24):
        assert error_between(cheap[:, token : token + 1], whole[:, token : token + 1]) > tolerance
