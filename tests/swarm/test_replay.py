"""A history told as one prompt leads to the same cache, however its steps were cut, reordered and masked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from petals.models.source.loading import load_span
from petals.peer.client.hops.hop import StepInput
from petals.peer.client.hops.replay import as_one_prompt
from tests.swarm.conftest import Truth

BATCH, SIZE = 3, 32


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def history(*lengths: int, masked: bool = False, reordered: bool = False, deep: bool = False) -> list[StepInput]:
    dice = torch.Generator().manual_seed(1)
    steps, position = [], 0
    mask = torch.ones(BATCH, sum(lengths), dtype=torch.bool)
    mask[0, :2] = False
    for index, length in enumerate(lengths):
        hypo_ids = torch.randint(BATCH, (BATCH,), generator=dice) if reordered and index else None
        if hypo_ids is not None:
            mask = mask[hypo_ids]
        steps.append(
            StepInput(
                position=position,
                hidden=noise(BATCH, length, SIZE, seed=index),
                attention_mask=mask[:, : position + length] if masked else None,
                prompts=noise(4, BATCH, 2, SIZE) if deep and not index else None,
                hypo_ids=hypo_ids,
            )
        )
        position += length
    return steps


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_the_cache_is_the_same(tiny_truth: Truth, masked: bool, reordered: bool, deep: bool) -> None:
    span = load_span(tiny_truth.checkpoint, range(4))
    told = history(5, 1, 1, 3, 1, masked=masked, reordered=reordered, deep=deep)
    last = noise(BATCH, 1, SIZE, seed=99)
    mask = (
        None if told[-1].attention_mask is None else torch.nn.functional.pad(told[-1].attention_mask, (0, 1), value=1)
    )
    answers = []
    for steps in (told, as_one_prompt(told), as_one_prompt(told, chunk_tokens=4)):
        cache = span.new_cache(range(4), BATCH, 12)
        for step in steps:
            span.step(
                step.hidden, cache, attention_mask=step.attention_mask, prompts=step.prompts, hypo_ids=step.hypo_ids
            )
        assert cache.position == 11
        answers.append(span.step(last, cache, attention_mask=mask))
    assert len(as_one_prompt(told)) == 1
    assert [step.hidden.shape[1] for step in as_one_prompt(told, chunk_tokens=4)] == [4, 4, 3]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-3, atol=1e-3)


def test_a_history_that_no_prompt_reproduces_stays() -> None:
    told = history(3, 1, 1, masked=True)
    hidden_later = torch.ones(BATCH, 5, dtype=torch.bool)
    hidden_later[:, 1] = False  # a token that earlier steps saw
    contradicting = [*told[:2], replace(told[2], attention_mask=hidden_later)]
    overlapping = [*history(3, 1), StepInput(position=2, hidden=noise(BATCH, 1, SIZE))]
    for steps in (contradicting, overlapping, []):
        assert [id(step) for step in as_one_prompt(steps)] == [id(step) for step in steps]
