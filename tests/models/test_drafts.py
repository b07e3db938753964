"""Drafts from the text: what is proposed, and when a draft is worth its step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.models.client.drafts import LONGEST_DRAFT, SHORTEST_MATCH, DraftPolicy, NgramIndex


def proposal(text: Sequence[int], count: int = 4) -> list[int]:
    index = NgramIndex()
    index.extend(text)
    return drafted(index, count)


def drafted(index: NgramIndex, count: int) -> list[int]:
    match, place = index.match()
    return index.repeat(place, count) if match else []


def test_what_followed_the_same_words_is_proposed() -> None:
    assert proposal([1, 2, 3, 4, 5, 6, 9, 1, 2, 3]) == [4, 5, 6, 9]
    assert proposal([1, 2, 3, 4, 5]) == []
    assert proposal([1]) == []
    assert proposal([]) == []


def test_the_longest_match_and_of_those_the_latest_wins() -> None:
    assert proposal([7, 1, 2, 50, 8, 1, 2, 60, 7, 1, 2], 1) == [50]
    assert proposal([1, 2, 50, 1, 2, 60, 9, 1, 2], 1) == [60]


def test_a_period_goes_on() -> None:
    assert proposal([1, 2, 3] * 3, 7) == [1, 2, 3, 1, 2, 3, 1]
    assert proposal([5, 5, 5], 4) == [5, 5, 5, 5]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20), st.integers(1, 5))
def test_an_index_that_grows_is_the_index_of_the_whole_text(text: list[int], count: int, piece: int) -> None:
    growing = NgramIndex()
    for at in range(0, len(text), piece):
        growing.extend(text[at : at + piece])
    draft = drafted(growing, count)
    assert draft == proposal(text, count)
    assert len(draft) in (0, count)
    if draft:  # it did stand in the text, behind the same words
        tail = text[-SHORTEST_MATCH:]
        assert any(text[at : at + 2] == tail and text[at + 2] == draft[0] for at in range(len(text) - 2))


def measured(plain_s: float, more_s: float, right: int, drafted: int = 4) -> DraftPolicy:
    policy = DraftPolicy()
    for _ in range(4):
        policy.note(0, 0, 0, plain_s)
    for _ in range(12):
        policy.note(3, drafted, right, plain_s + more_s * drafted)
    return policy


def test_nothing_is_drafted_before_steps_are_measured_or_where_they_are_quick() -> None:
    assert DraftPolicy().length(3) == 0
    assert measured(0.002, 0.0, right=4).length(3) == 0


def test_far_servers_get_long_drafts_while_they_are_right_and_none_while_they_are_wrong() -> None:
    assert measured(0.150, 0.001, right=4).length(3) == LONGEST_DRAFT
    assert measured(0.150, 0.010, right=0).length(3) <= 1
    assert measured(0.050, 0.050, right=0).length(3) == 0


def test_a_busy_processor_gets_shorter_drafts_than_a_far_one() -> None:
    assert 0 < measured(0.040, 0.020, right=3).length(3) < measured(0.040, 0.001, right=3).length(3)


def test_what_was_wrong_for_a_while_is_tried_again() -> None:
    policy = measured(0.050, 0.010, right=0)
    assert policy.length(3) == 0
    assert policy.length(4) > 0  # longer matches are judged by themselves
    for _ in range(40):
        policy.note(3, 0, 0, 0.050)
    assert policy.length(3) > 0


@pytest.mark.parametrize(("mode", "length"), [("always", LONGEST_DRAFT), ("never", 0)])
def test_a_caller_may_decide(mode: str, length: int) -> None:
    assert DraftPolicy(mode=mode).length(3) == length  # type: ignore[arg-type]
