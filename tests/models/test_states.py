"""Blocks that keep recurrent states: sessions roll back exactly, in memory that was known before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from petals.models.blocks.block import BlockSpan
from petals.models.blocks.cache import SpanCache
from petals.models.blocks.states import SNAPSHOTS, with_new_columns
from petals.models.errors import StepError
from tests.models.conftest import Tiny
from tests.models.tiny import CASES, HIDDEN, Case

KINDS = ("granite-hybrid", "qwen3-next", "falcon-h1", "lfm2")
ROWS, TOKENS = 2, 16


@pytest.fixture(params=KINDS)
def span(request: pytest.FixtureRequest, make_tiny: Callable[[Case], Tiny]) -> BlockSpan:
    return make_tiny(next(case for case in CASES if case.id == request.param)).whole


def some_hidden(seed: int = 1, tokens: int = TOKENS) -> Tensor:
    return torch.randn(ROWS, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def steps(span: BlockSpan, cache: SpanCache, hidden: Tensor, *sizes: int, mask: Tensor | None = None) -> Tensor:
    outputs = []
    for part in hidden.split(sizes, dim=1):
        known = None if mask is None else mask[:, : cache.position + part.shape[1]]
        outputs.append(span.step(part, cache, attention_mask=known))
    return torch.cat(outputs, 1)


def same(ours: Tensor, theirs: Tensor) -> None:
    assert_close(ours, theirs, rtol=1e-4, atol=max(1e-4, 2e-5 * float(theirs.abs().max())))


@pytest.mark.parametrize("position", [15, 13, 12, 7, 2, 0])
def test_a_session_rolls_back_to_any_position(span: BlockSpan, position: int) -> None:
    """To the start of a step, into the middle of one, and behind every snapshot."""
    text, other = some_hidden(1), some_hidden(2)
    whole = span.forward(text, span.blocks)
    cache = span.new_cache(span.blocks, ROWS, TOKENS)
    mixed = torch.cat([text[:, :position], other[:, position:]], 1)
    steps(span, cache, mixed, 6, 3, 3, 1, 1, 1, 1)
    cache.rollback(position)
    assert cache.position == position
    ours = steps(span, cache, text[:, position:], *[1] * (TOKENS - position))
    same(ours, whole[:, position:])
    assert cache.position == TOKENS
    assert not cache.lag


def test_drafts_are_rejected_again_and_again(span: BlockSpan) -> None:
    text, drafts = some_hidden(1), some_hidden(2)
    whole = span.forward(text, span.blocks)
    cache = span.new_cache(span.blocks, ROWS, TOKENS + 4)
    span.step(text[:, :4], cache)
    outputs = []
    for at in range(4, TOKENS - 2, 2):
        guess = torch.cat([text[:, at : at + 2], drafts[:, :3]], 1)
        outputs.append(span.step(guess, cache)[:, :2])
        cache.rollback(at + 2)
    same(torch.cat(outputs, 1), whole[:, 4 : TOKENS - 2])


def test_rows_are_reordered_with_what_is_needed_to_roll_back(span: BlockSpan) -> None:
    text = some_hidden(1)
    crossed = text[[1, 1]]
    whole = span.forward(torch.cat([crossed[:, :10], text[:, 10:]], 1), span.blocks)
    cache = span.new_cache(span.blocks, ROWS, TOKENS)
    steps(span, cache, text[:, :12], 8, 2, 1, 1)
    cache.rollback(10)
    output = span.step(text[:, 10:], cache, hypo_ids=torch.tensor([1, 1]))
    same(output, whole[:, 10:])
    cache.rollback(9)  # rows of the past are the reordered ones
    same(span.step(text[[1, 1], 9:10], cache), span.forward(crossed[:, :10], span.blocks)[:, 9:])


def test_padding_is_remembered(span: BlockSpan) -> None:
    text = some_hidden(1)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    mask[0, :3] = 0
    whole = span.forward(text, span.blocks, attention_mask=mask)
    cache = span.new_cache(span.blocks, ROWS, TOKENS)
    steps(span, cache, text, 8, 4, 4, mask=mask)
    cache.rollback(6)
    same(steps(span, cache, text[:, 6:], 1, 9, mask=mask), whole[:, 6:])


def test_a_step_that_fails_half_way_changed_nothing(span: BlockSpan) -> None:
    text = some_hidden(1)
    whole = span.forward(text, span.blocks)
    cache = span.new_cache(span.blocks, ROWS, TOKENS)
    steps(span, cache, text[:, :7], 5, 1, 1)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = span.layers()[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        span.step(text[:, 7:9], cache)
    handle.remove()
    assert cache.position == 7
    same(span.step(text[:, 7:], cache), whole[:, 7:])


def test_two_sessions_do_not_disturb_each_other(span: BlockSpan) -> None:
    texts = some_hidden(1), some_hidden(2)
    caches = [span.new_cache(span.blocks, ROWS, TOKENS) for _ in texts]
    outputs: list[list[Tensor]] = [[], []]
    for begin, end in ((0, 5), (5, 6), (6, 11), (11, TOKENS)):
        for text, cache, output in zip(texts, caches, outputs, strict=True):
            output.append(span.step(text[:, begin:end], cache))
    for text, output in zip(texts, outputs, strict=True):
        same(torch.cat(output, 1), span.forward(text, span.blocks))


def test_memory_is_what_was_said_before(span: BlockSpan) -> None:
    """Nothing that a session does takes more than its lease."""
    cache = span.new_cache(span.blocks, ROWS, TOKENS)
    assert cache.nbytes == span.cache_bytes(span.blocks, ROWS, TOKENS)
    steps(span, cache, some_hidden(), 6, 1, 1, 1, 1, 1, 1, 4)
    layers = [cache.layer(block) for block in span.blocks]
    recall = cache._recall
    assert recall is not None
    assert len(recall._snapshots) == SNAPSHOTS
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
    held += [*recall.states, recall.inputs, *(state for each in recall._snapshots for state in each.states)]
    assert sum(tensor.nbytes for tensor in held) <= cache.nbytes
    short, long = (span.cache_bytes(span.blocks, 1, tokens) for tokens in (1, 1001))
    assert (long - short) % 1000 == 0


def test_deep_prompts_are_not_kept(span: BlockSpan) -> None:
    text = some_hidden(1)
    prompts = torch.randn(len(span.blocks), ROWS, 2, HIDDEN, generator=torch.Generator().manual_seed(3))
    whole = span.forward(text, span.blocks, prompts=prompts)
    cache = span.new_cache(span.blocks, ROWS, TOKENS)
    same(span.step(text[:, :6], cache, prompts=prompts), whole[:, :6])
    steps(span, cache, text[:, 6:12], 1, 1, 1, 1, 1, 1)
    with pytest.raises(StepError, match="began with deep prompts; go back to 0, or to 6 or later"):
        cache.rollback(4)
    cache.rollback(8)
    same(span.step(text[:, 8:], cache), whole[:, 8:])
    cache.rollback(0)
    same(span.step(text, cache), span.forward(text, span.blocks))


def test_nothing_begins_with_a_part_of_another_session(span: BlockSpan) -> None:
    one, two = (span.new_cache(span.blocks, ROWS, TOKENS) for _ in range(2))
    span.step(some_hidden(), one)
    assert not span.cache_depends_on_tokens_only
    with pytest.raises(StepError, match="recurrent states"):
        two.copy_from(one, 4)


def test_columns_of_a_convolution() -> None:
    new = torch.arange(1.0, 3.0).view(1, 1, 2)
    assert with_new_columns(None, new, 4).tolist() == [[[0, 0, 1, 2]]]
    assert with_new_columns(torch.full((1, 1, 3), 7.0), new, 3).tolist() == [[[7, 7, 7, 1, 2]]]
