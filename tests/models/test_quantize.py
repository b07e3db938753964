"""Quantised blocks: how far from the float ones, what gradients they give, and what they weigh."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from petals.models.errors import UnsupportedModel
from petals.models.kernels import quantize
from petals.models.kernels.quantize import Int8Linear, dequantize_rows, quantize_head, quantize_rows
from petals.models.source.loading import load_span
from tests.models.conftest import Tiny, load_stock
from tests.models.tiny import CASES, Case, Reference, make_model

pytestmark = pytest.mark.filterwarnings(  # bitsandbytes and torch about each other's internals
    "ignore:.*_check_is_size will be removed:FutureWarning",
)

ROUGHLY = {"int8": (0.03, 0.06), "nf4": (1e-4, 0.9)}
"""Relative error of one lively block, as a quotient of norms: against a float block that has the dequantised weights
(int8 rounds its rows to bfloat16), and against the exact one. Unrelated outputs differ by 1.4."""


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def test_integers_are_the_nearest_there_are() -> None:
    weight = noise(7, 64) * torch.logspace(-4, 4, 7)[:, None]
    integers, scale = quantize_rows(weight)
    assert (integers.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    error = (dequantize_rows(integers, scale, torch.float32) - weight).abs()
    largest = weight.abs().amax(1, keepdim=True)
    assert bool((error <= 0.5 * scale.float()[:, None] + largest * 2**-8).all())
    assert bool((integers.abs().amax(1) >= 126).all()), "the whole range is used"


def test_a_matrix_is_quantised_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_rows(noise(7, 16))
    monkeypatch.setattr(quantize, "_PIECE_ROWS", 3)
    for ours, theirs in zip(quantize_rows(noise(7, 16)), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_a_head_refuses_integers() -> None:
    """Some families cast to the dtype of `lm_head.weight`."""
    head = quantize_head(nn.Linear(16, 8))
    with pytest.raises(UnsupportedModel, match="head_quant none"):
        head(noise(1, 16).to(torch.int8))


def test_a_row_of_zeros() -> None:
    integers, scale = quantize_rows(torch.zeros(3, 8))
    assert not integers.any()
    assert bool(torch.isfinite(scale).all())


@pytest.mark.parametrize("rows", [1, 32, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_and_many_multiply_by_the_same_weights(rows: int, dtype: torch.dtype) -> None:
    layer = Int8Linear(noise(48, 32), noise(48))
    weight = dequantize_rows(layer.weight, layer.scale, torch.float32)
    hidden = noise(1, rows, 32).to(dtype)
    expected = nn.functional.linear(hidden.float(), weight, layer.bias)
    out = layer(hidden)
    assert out.dtype == dtype
    assert_close(out.float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("inner", [1, 7, 24, 40, 100])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_inner_sizes_that_the_kernel_would_read_beyond(rows: int, inner: int) -> None:
    """torch 2.13 reads foreign memory or ends the process when the inner size is no multiple of 16."""
    layer = Int8Linear(noise(9, inner), None)
    hidden = noise(1, rows, inner)
    expected = nn.functional.linear(hidden, dequantize_rows(layer.weight, layer.scale, torch.float32))
    assert_close(layer(hidden), expected)


@pytest.mark.parametrize("rows", [1, 40])
def test_the_gradient_is_that_of_the_dequantised_weights(rows: int) -> None:
    layer = Int8Linear(noise(48, 32), None)
    weight = dequantize_rows(layer.weight, layer.scale, torch.float32)
    hidden, outer = noise(2, rows, 32).requires_grad_(), noise(2, rows, 48)
    (grad,) = torch.autograd.grad((layer(hidden) * outer).sum(), [hidden])
    assert_close(grad, outer @ weight)


@pytest.mark.parametrize("quant_type", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_blocks_are_near_the_exact_ones(family: str, quant_type: str, make_tiny: Callable[[Case], Tiny]) -> None:
    tiny = make_tiny(next(case for case in CASES if case.id == family))
    block = range(1, 2)
    span = load_span(tiny.checkpoint, block, quant_type=quant_type)
    twin = load_stock(tiny.checkpoint, block)
    dequantize_into(twin.layers()[0], span.layers()[0])
    outer = noise(2, 12, 32).flip(0)
    for exact, limit in zip((twin, tiny.whole), ROUGHLY[quant_type], strict=True):
        hidden, exact_hidden = noise(2, 12, 32).requires_grad_(), noise(2, 12, 32).requires_grad_()
        out, expected = span.forward(hidden, block), exact.forward(exact_hidden, block)
        assert relative_error(out, expected) < limit
        cache = span.new_cache(block, 2, 12)
        stepped = torch.cat([span.step(hidden.detach()[:, a:b], cache) for a, b in ((0, 8), (8, 9), (9, 12))], 1)
        assert relative_error(stepped, expected) < limit
        (grad,) = torch.autograd.grad((out * outer).sum(), [hidden])
        (expected_grad,) = torch.autograd.grad((expected * outer).sum(), [exact_hidden])
        assert relative_error(grad, expected_grad) < limit


def dequantize_into(block: nn.Module, quantized: nn.Module) -> None:
    """Give a float block the weights that a quantised one stands for."""
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in quantized.named_modules():
        if isinstance(layer, Int8Linear):
            weight = dequantize_rows(layer.weight, layer.scale, torch.float32)
        elif type(layer).__name__ == "Linear4bit":
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            continue
        home = block.get_submodule(name)
        assert isinstance(home.weight, Tensor)
        home.weight.data.copy_(weight.t() if isinstance(home, Conv1D) else weight)


@pytest.mark.parametrize(("quant_type", "bytes_per_weight"), [("int8", 1.0), ("nf4", 0.5)])
def test_what_a_block_weighs(
    quant_type: str, bytes_per_weight: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from petals.models.source.checkpoint import open_checkpoint

    case = Case(
        "wide",
        "llama",
        "",
        {
            "vocab_size": 64,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    )
    directory = tmp_path_factory.mktemp("wide")
    model = make_model(case.config())
    model.save_pretrained(directory)
    weights = sum(p.numel() for p in Reference(model).layers[0].parameters() if p.ndim == 2)
    span = load_span(open_checkpoint(directory), range(1), quant_type=quant_type)
    assert span.quant_type == quant_type
    assert weights * bytes_per_weight < span.weight_bytes < weights * bytes_per_weight * 1.05 + 4096


@pytest.mark.parametrize(("quant_type", "share", "limit"), [("int8", 0.35, 0.05), ("nf4", 0.35, 0.4)])
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_fused_experts(
    family: str, quant_type: str, share: float, limit: float, make_tiny: Callable[[Case], Tiny]
) -> None:
    tiny = make_tiny(next(case for case in CASES if case.id == family))
    block = range(1, 2)
    span, exact = load_span(tiny.checkpoint, block, quant_type=quant_type), load_stock(tiny.checkpoint, block)
    assert span.weight_bytes < share * exact.weight_bytes
    # Rounded weights may send a token to another expert, which would say nothing about the arithmetic: compare the
    # exact block with the weights that the quantised one reads.
    with torch.no_grad():
        for name, weight in exact.layers()[0].named_parameters():
            if weight.ndim == 3:
                owner, _, leaf = name.rpartition(".")
                weight.copy_(getattr(span.layers()[0].get_submodule(owner), leaf))
    dequantize_into(exact.layers()[0], span.layers()[0])
    hidden, exact_hidden = noise(2, 12, 32).requires_grad_(), noise(2, 12, 32).requires_grad_()
    out, expected = span.forward(hidden, block), exact.forward(exact_hidden, block)
    assert relative_error(out, expected) < limit
    (grad,) = torch.autograd.grad(out.sum(), [hidden])
    (expected_grad,) = torch.autograd.grad(expected.sum(), [exact_hidden])
    assert relative_error(grad, expected_grad) < limit


def test_an_unknown_quantisation(llama: Tiny) -> None:
    with pytest.raises(UnsupportedModel, match="there are none, int8, nf4"):
        load_span(llama.checkpoint, range(1), quant_type="int3")
