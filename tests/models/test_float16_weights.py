"""Weights in half the bytes: the same numbers, the same gradients, and bits that do not depend on the company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from petals.models.kernels import float16_weights
from petals.models.kernels.float16_weights import HalfLinear, HalfMatrix, halve, halve_linears
from petals.models.kernels.small_matmul import FewRowsLinear
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from petals.models.source.sizing import sizes_of
from tests.models.conftest import Tiny, load_stock
from tests.models.test_lean import play
from tests.models.tiny import BLOCKS, CASES, HIDDEN, Case, save_tiny
from tests.tolerance import assert_rounded

MakeTiny = Callable[[Case], Tiny]
pytestmark = pytest.mark.skipif(
    not float16_weights.can_halve(), reason="this torch has no FBGEMM: float32 weights stay float32"
)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def halved(weight: Tensor, bias: Tensor | None = None) -> HalfMatrix:
    matrix = halve(weight, bias)
    assert matrix is not None
    return matrix


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e4])
def test_what_checkpoints_hold_is_held_exactly(dtype: torch.dtype, scale: float) -> None:
    weight = (noise(0, 67, 43) * (min(scale, 1.0) if dtype == torch.float16 else scale)).to(dtype).float()
    matrix = halved(weight)
    assert_close(matrix.widened(), weight, rtol=0, atol=2.0**-40 * float(weight.abs().max()))
    bias = noise(1, 67)
    rows = noise(2, 5, 43)
    biased = halved(weight, bias).times(rows)
    assert_close(biased, F.linear(rows, weight, bias), rtol=1e-5, atol=1e-5 * (1 + float(weight.abs().max())))
    assert matrix.nbytes == 2 * weight.numel()


@pytest.mark.parametrize(
    "weight",
    [
        noise(0, 8, 8),
        torch.full((4, 4), float("nan")),
        torch.tensor([[1.0, float("inf")]]),
        torch.tensor([[1.0], [2.0**-45 * 1.2345]]),  # nothing of the second row would be left
        torch.zeros(3, 0),
        noise(0, 8, 8).bfloat16(),
    ],
)
def test_what_would_lose_something_stays(weight: Tensor) -> None:
    assert halve(weight) is None


def test_zeros_are_numbers() -> None:
    assert torch.equal(halved(torch.zeros(3, 4)).times(noise(0, 2, 4)), torch.zeros(2, 3))


def test_the_company_does_not_matter() -> None:
    """Not to the last bit: neither other rows nor the number of threads."""
    matrix = halved(noise(0, 515, 1030).bfloat16().float(), noise(1, 515))
    rows = noise(2, 300, 1030)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = matrix.times(rows)
        for first, count in ((0, 1), (7, 2), (50, 13), (3, 64), (99, 200)):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(matrix.times(rows[first : first + count]), together[first : first + count])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kept", [True, False])
def test_gradients(kept: bool) -> None:
    plain = nn.Sequential(nn.Linear(16, 33), nn.Linear(33, 8, bias=False), Conv1D(24, 8))
    for parameter in plain.parameters():
        parameter.data = parameter.data.half().float()
    plain.requires_grad_(False)
    ours = nn.Sequential(*plain)
    halve_linears(ours, keep_transposed=kept)
    assert [type(layer) for layer in ours] == [HalfLinear] * 3
    hidden = noise(3, 2, 5, 16).requires_grad_()
    expected, got = plain(hidden), ours(hidden)
    assert_close(got, expected)
    weight = noise(4, *expected.shape)
    held = sum(layer.weight_bytes for layer in ours if isinstance(layer, HalfLinear))
    for _ in range(2):
        (wanted,) = torch.autograd.grad((plain(hidden) * weight).sum(), hidden)
        (gradient,) = torch.autograd.grad((ours(hidden) * weight).sum(), hidden)
        assert_close(gradient, wanted)
    now = sum(layer.weight_bytes for layer in ours if isinstance(layer, HalfLinear))
    assert now == (2 * held if kept else held)


def test_a_half_linear_looks_like_a_linear() -> None:
    linear = nn.Linear(5, 7)
    linear.weight.data = linear.weight.data.half().float()
    box = nn.Sequential(linear)
    halve_linears(box)
    half = box[0]
    assert isinstance(half, HalfLinear)
    assert (half.in_features, half.out_features) == (5, 7)
    assert torch.equal(half.weight, linear.weight)
    assert half(torch.zeros(0, 5)).shape == (0, 7)
    assert "in_features=5" in repr(half)


@pytest.mark.parametrize("family", ["llama", "bloom", "qwen3", "gpt2"])
def test_blocks_are_held_in_half_the_bytes(family: str, make_tiny: MakeTiny) -> None:
    checkpoint = make_tiny(next(case for case in CASES if case.id == family)).checkpoint
    span = load_span(checkpoint, range(BLOCKS))
    linears = [module for layer in span.layers() for module in layer.modules() if isinstance(module, HalfLinear)]
    assert len(linears) >= 4 * BLOCKS
    assert span.dtype == torch.float32
    matrices = sum(linear.in_features * linear.out_features for linear in linears)
    assert load_stock(checkpoint, range(BLOCKS)).weight_bytes - span.weight_bytes == 2 * matrices


@pytest.mark.parametrize("seed", range(3))
def test_sessions_in_company_get_the_same_bits(seed: int, make_tiny: MakeTiny) -> None:
    """What is computed together is what is computed alone, to the last bit."""
    for case_id in ("llama", "bloom"):
        span = make_tiny(next(case for case in CASES if case.id == case_id)).whole
        assert span.lean
        for together, alone in zip(play(span, seed, together=True), play(span, seed, together=False), strict=True):
            assert torch.equal(together, alone)


def test_bfloat16_checkpoints(tmp_path: Path, llama: Tiny) -> None:
    save_tiny(llama.case, tmp_path, stored=torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path)
    span = load_span(checkpoint, range(BLOCKS), dtype=torch.float32)
    assert any(isinstance(module, HalfLinear) for module in span.layers()[0].modules())
    hidden = noise(6, 2, 5, HIDDEN)
    stock = load_stock(checkpoint, range(BLOCKS))
    assert_rounded(span.forward(hidden, range(BLOCKS)), stock.forward(hidden, range(BLOCKS)))


def test_a_head_follows_its_weights() -> None:
    head = nn.Linear(16, 33)
    head.weight.data = head.weight.data.half().float()
    head.requires_grad_(False)
    head.__class__ = FewRowsLinear
    hidden = noise(7, 3, 16)
    assert_close(head(hidden), F.linear(hidden, head.weight, head.bias))
    head.weight.mul_(2)
    assert_close(head(hidden), F.linear(hidden, head.weight, head.bias))
    head.weight.data = noise(8, 33, 16)
    assert_close(head(hidden), F.linear(hidden, head.weight, head.bias))


def test_a_torch_without_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    float16_weights.can_halve.cache_clear()
    try:
        monkeypatch.setattr(float16_weights, "_ops", object)
        assert not float16_weights.can_halve()
        float16_weights.can_halve.cache_clear()
        monkeypatch.setattr(torch.backends.quantized.__class__, "supported_engines", ["qnnpack"])
        assert halve(torch.ones(2, 2)) is None
    finally:
        monkeypatch.undo()
        float16_weights.can_halve.cache_clear()
    assert float16_weights.can_halve()


def test_bytes_are_known_before_loading(make_tiny: MakeTiny, tmp_path: Path) -> None:
    for family in ("llama", "gpt2", "mixtral"):  # fused experts are no linear layers
        case = next(case for case in CASES if case.id == family)
        save_tiny(case, tmp_path / family, stored=torch.float16)
        checkpoint = open_checkpoint(tmp_path / family)
        for dtype in (torch.float32, torch.float16):
            span = load_span(checkpoint, range(1), dtype=dtype)
            held = span.weight_bytes - sum(buffer.nbytes for layer in span.layers() for buffer in layer.buffers())
            assert abs(sizes_of(checkpoint, dtype, span.device).kept[0] - held) < 0.05 * held
