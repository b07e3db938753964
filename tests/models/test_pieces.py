"""Whole passes and their gradients, in pieces: the same numbers as in one go, however they are cut."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from petals.models.blocks.adapters import Lora, LowRank
from petals.models.blocks.pieces import MIN_TOKENS, BackwardPass, ForwardPass, Pieces, Sequences
from tests.models.conftest import Tiny

ROWS, TOKENS, PREFIX = 3, 23, 2
MANY = 1 << 40
CUTS = {"one go": MANY, "some rows": 40, "some blocks": 100, "some tokens": 15, "a few tokens": 1}


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drive(pieces: Pieces, units: int) -> list[int]:
    """Run it; the units of each piece."""
    taken = []
    try:
        taken.append(next(pieces))
        while True:
            taken.append(pieces.send(units))
    except StopIteration:
        return taken


def given(tiny: Tiny, *, extras: bool) -> Sequences:
    """Padded rows, prompts and an adapter of the client's own, or none of it."""
    span, blocks = tiny.whole, range(1, tiny.whole.blocks.stop)
    if not extras:
        return Sequences(blocks, noise(ROWS, TOKENS, span.hidden_size))
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    mask[1, :5] = False
    layers = {}
    for block in blocks:
        path, (inner, outer) = next(iter(span.linear_features(block).items()))
        layers[block, path] = LowRank(noise(2, inner, seed=block), noise(outer, 2, seed=block + 50), 0.5)
    return Sequences(
        blocks,
        noise(ROWS, TOKENS, span.hidden_size),
        mask,
        noise(len(blocks), ROWS, PREFIX, span.hidden_size, seed=3),
        Lora("client", layers),
    )


def in_one_go(tiny: Tiny, given: Sequences, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [given.hidden, *([] if given.prompts is None else [given.prompts]), *given.factors]
    for leaf in leaves:
        leaf.requires_grad_()
    output = tiny.whole.forward(
        given.hidden, given.blocks, attention_mask=given.attention_mask, prompts=given.prompts, adapter=given.adapter
    )
    grads = torch.autograd.grad(output, leaves, grad, allow_unused=True, materialize_grads=True)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return output.detach(), list(grads)


def real(given: Sequences) -> Tensor:
    """Where there is no padding: what comes out there is nobody's business."""
    mask = given.attention_mask
    return torch.ones(ROWS, TOKENS, dtype=torch.bool) if mask is None else mask


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "mask, prompts, adapter"])
def test_every_family_in_every_cut(tiny: Tiny, extras: bool) -> None:
    asked = given(tiny, extras=extras)
    grad = noise(*asked.hidden.shape, seed=9) * real(asked)[..., None]
    output, grads = in_one_go(tiny, asked, grad)
    close = {"rtol": 2e-3, "atol": 2e-3 * float(output.abs().max())}
    cuts = CUTS if tiny.case.id in ("llama", "bloom") else {name: CUTS[name] for name in ("one go", "some tokens")}
    for units in cuts.values():
        forward = ForwardPass(tiny.whole, asked)
        drive(forward.pieces(units), units)
        assert_close(forward.output[real(asked)], output[real(asked)], **close)
        for keep_bytes in (0, MANY) if units > TOKENS else (0,):
            backward = BackwardPass(tiny.whole, asked, grad, keep_bytes)
            drive(backward.pieces(units), units)
            got = [backward.hidden, *([] if backward.prompts is None else [backward.prompts]), *backward.factors]
            for mine, theirs in zip(got, grads, strict=True):
                assert_close(mine, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))


def test_no_piece_is_larger_than_allowed(llama: Tiny) -> None:
    asked = given(llama, extras=True)
    for units in (12, 30, 100, 1000):
        most = max(drive(ForwardPass(llama.whole, asked).pieces(units), units))
        assert most <= units
        for keep_bytes in (0, MANY):
            backward = BackwardPass(llama.whole, asked, noise(*asked.hidden.shape), keep_bytes)
            assert max(drive(backward.pieces(units), units)) <= max(units, 3 * MIN_TOKENS)


def test_less_is_allowed_while_it_runs(llama: Tiny) -> None:
    """Somebody begins to decode: the next piece is a small one already."""
    asked = given(llama, extras=False)
    pieces = BackwardPass(llama.whole, asked, noise(*asked.hidden.shape), 0).pieces(3 * TOKENS * 4)
    next(pieces)
    taken = [pieces.send(3 * MIN_TOKENS) for _ in range(20)]
    assert max(taken) <= 3 * MIN_TOKENS


def graphs() -> int:
    """Tensors of this process that have one."""
    gc.collect()
    return sum(issubclass(type(each), Tensor) and each.grad_fn is not None for each in gc.get_objects())


def test_nothing_is_kept_but_what_may_be(llama: Tiny) -> None:
    """Graphs from the forward pass of a backward request, counted while it waits for its turn."""
    asked, before = given(llama, extras=False), graphs()
    held = {}
    for keep_bytes in (0, MANY):
        backward = BackwardPass(llama.whole, asked, noise(*asked.hidden.shape), keep_bytes)
        pieces = backward.pieces(150)
        next(pieces)
        for _ in range(2):
            pieces.send(150)
        held[keep_bytes] = graphs() - before
        pieces.close()
        del pieces, backward
    assert held[0] == 0
    assert held[MANY] > 0
    assert graphs() == before


def test_scores_of_long_rows_are_bounded(bloom: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention holds (heads, new, all) floats: a row that would take too many is cut, whatever the pace."""
    monkeypatch.setattr("petals.models.blocks.pieces.SCORES_BYTES", 4 * bloom.whole.heads * TOKENS * 6)
    asked = given(bloom, extras=False)
    forward = ForwardPass(bloom.whole, asked)
    assert max(drive(forward.pieces(MANY), MANY)) < TOKENS
    assert_close(forward.output, in_one_go(bloom, asked, asked.hidden)[0], rtol=1e-3, atol=1e-3)
