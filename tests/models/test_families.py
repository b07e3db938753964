"""Every family's blocks, loaded by us, give what the family's own full model gives inside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close as torch_assert_close

from petals.models.client.local import LocalChain
from petals.models.library_contract import DEFAULT_CACHE_NAME
from tests.models.conftest import Tiny
from tests.models.tiny import VOCABULARY
from tests.tolerance import assert_rounded

"""Lively blocks put out values of about 30: the absolute part is a few roundings of float32 at that size."""


def some_ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def test_prefill_single_and_several_token_steps(tiny: Tiny) -> None:
    ids = some_ids()
    inputs, result = tiny.reference.run(ids[:, :5], use_cache=True)
    with LocalChain(tiny.parts).open_session(batch_size=2, max_length=12) as session:
        assert_rounded(session.step(inputs[0]), inputs[-1])
        for begin, end in ((5, 6), (6, 7), (7, 10), (10, 12)):
            inputs, result = tiny.reference.run(ids[:, begin:end], cache=getattr(result, DEFAULT_CACHE_NAME))
            assert_rounded(session.step(inputs[0]), inputs[-1])
        assert session.position == 12


@torch.no_grad()
def test_forward_without_cache(tiny: Tiny) -> None:
    inputs, _ = tiny.reference.run(some_ids(), use_cache=False)
    assert_rounded(LocalChain(tiny.whole).forward(inputs[0]), inputs[-1])
    assert_rounded(LocalChain(tiny.parts).forward(inputs[0]), inputs[-1])


@torch.no_grad()
def test_left_padded_batch(tiny: Tiny) -> None:
    """Positions and masks as `generate` gives them to the full model; only real tokens matter."""
    ids, pads = some_ids(), 3
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :pads] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    takes_positions = tiny.case.model_type not in ("bloom",)

    def reference(begin: int, end: int, past: object) -> tuple[list[Tensor], object]:
        extra = {"position_ids": positions[:, begin:end]} if takes_positions else {}
        inputs, result = tiny.reference.run(
            ids[:, begin:end], attention_mask=mask[:, :end], cache=past, use_cache=True, **extra
        )
        return inputs, getattr(result, DEFAULT_CACHE_NAME)

    inputs, past = reference(0, 7, None)
    with LocalChain(tiny.parts).open_session(batch_size=2, max_length=12) as session:
        out = session.step(inputs[0], attention_mask=mask[:, :7])
        assert_rounded(out[0, pads:], inputs[-1][0, pads:])
        assert_rounded(out[1], inputs[-1][1])
        for begin, end in ((7, 8), (8, 11), (11, 12)):
            inputs, past = reference(begin, end, past)
            assert_rounded(session.step(inputs[0], attention_mask=mask[:, :end]), inputs[-1])
    inputs, _ = tiny.reference.run(
        ids, attention_mask=mask, use_cache=False, **({"position_ids": positions} if takes_positions else {})
    )
    out = LocalChain(tiny.whole).forward(inputs[0], attention_mask=mask)
    assert_rounded(out[0, pads:], inputs[-1][0, pads:])
    assert_rounded(out[1], inputs[-1][1])


@pytest.mark.parametrize("blocks", [range(1, 3), range(3, 4), range(2, 4)], ids=str)
@torch.no_grad()
def test_sub_range_of_a_loaded_span(tiny: Tiny, blocks: range) -> None:
    ids = some_ids()
    inputs, _ = tiny.reference.run(ids, use_cache=False)
    assert_rounded(tiny.whole.forward(inputs[blocks.start], blocks), inputs[blocks.stop])
    inputs = tiny.reference.run_in_steps(ids, [6, 7])
    hidden, expected = inputs[blocks.start], inputs[blocks.stop]
    cache = tiny.whole.new_cache(blocks, 2, 12)
    out = torch.cat([tiny.whole.step(hidden[:, a:b], cache) for a, b in ((0, 6), (6, 7), (7, 12))], 1)
    assert_rounded(out, expected)


@torch.no_grad()
def test_rollback_past_any_window(tiny: Tiny) -> None:
    ids = some_ids()
    other = some_ids().flip(0)
    inputs = tiny.reference.run_in_steps(ids, [3])
    other_inputs, _ = tiny.reference.run(other, use_cache=False)
    with LocalChain(tiny.whole).open_session(batch_size=2, max_length=12) as session:
        session.step(inputs[0][:, :3])
        session.step(other_inputs[0][:, 3:])  # nine tokens of another text: longer than every window
        session.position = 3
        assert session.position == 3
        assert_rounded(session.step(inputs[0][:, 3:]), inputs[-1][:, 3:])


@torch.no_grad()
def test_beams_are_reordered(tiny: Tiny) -> None:
    ids = some_ids(3)
    beams = torch.tensor([2, 0, 0])
    inputs = tiny.reference.run_in_steps(ids, [8])
    crossed = tiny.reference.run_in_steps(torch.cat([ids[beams, :8], ids[:, 8:]], 1), [8])
    with LocalChain(tiny.parts).open_session(batch_size=3, max_length=12) as session:
        session.step(inputs[0][:, :8])
        out = session.step(inputs[0][:, 8:], hypo_ids=beams)
    assert_rounded(out, crossed[-1][:, 8:])


def test_gradients_of_input_and_prompts(tiny: Tiny) -> None:
    ids = some_ids()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        inputs, _ = tiny.reference.run(ids, use_cache=False)
    prompts = 0.3 * torch.randn(tiny.checkpoint.num_blocks, 2, 4, inputs[0].shape[2], generator=generator)
    weight = torch.randn(inputs[-1].shape, generator=generator)
    expected = tiny.reference.gradients(ids, inputs[0], prompts, weight)

    hidden, prompts = inputs[0].clone().requires_grad_(), prompts.clone().requires_grad_()
    out = LocalChain(tiny.parts).forward(hidden, prompts=prompts)
    gradients = torch.autograd.grad((out * weight).sum(), [hidden, prompts])
    for ours, theirs in zip((out, *gradients), expected, strict=True):
        torch_assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
    assert not any(p.requires_grad for layer in tiny.whole.layers() for p in layer.parameters())


@torch.no_grad()
def test_sessions_of_different_lengths_do_not_disturb_each_other(tiny: Tiny) -> None:
    """Some rotary embeddings remember how long the last sequence was; sessions share a span, not that memory."""
    ids, chain = some_ids(), LocalChain(tiny.whole)
    long = tiny.reference.run_in_steps(ids, [9, 10])
    short = tiny.reference.run_in_steps(ids, [2, 3, 4])
    with (
        chain.open_session(batch_size=2, max_length=12) as one,
        chain.open_session(batch_size=2, max_length=12) as two,
    ):
        first = [one.step(long[0][:, :9]), two.step(short[0][:, :2]), one.step(long[0][:, 9:10])]
        second = [two.step(short[0][:, 2:3]), one.step(long[0][:, 10:]), two.step(short[0][:, 3:4])]
    assert_rounded(torch.cat([first[0], first[2], second[1]], 1), long[-1])
    assert_rounded(torch.cat([first[1], second[0], second[2]], 1), short[-1][:, :4])
