"""The number of threads follows what pays, and looks for something better rarely."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from petals.models.kernels.threads import FIRST_WAIT, LONGEST_WAIT, TRIAL_RUNS, ThreadChoice, ThreadChoices


def run(choice: ThreadChoice, seconds: Callable[[int], float], runs: int) -> list[int]:
    """Threads of so many runs that take `seconds(threads)`."""
    used = []
    for _ in range(runs):
        used.append(choice.threads)
        choice.took(seconds(choice.threads))
    return used


@pytest.mark.parametrize(
    ("most", "seconds", "best"),
    [
        (2, {1: 1.0, 2: 0.7}, 2),
        (2, {1: 1.0, 2: 0.95}, 1),
        (2, {1: 1.0, 2: 5.0}, 1),
        (6, {1: 1.0, 2: 0.6, 4: 0.4, 6: 0.5}, 4),
        (6, {1: 1.0, 2: 0.6, 4: 0.4, 6: 0.3}, 6),
        (1, {1: 1.0}, 1),
    ],
)
def test_what_pays_is_found(most: int, seconds: dict[int, float], best: int) -> None:
    used = run(ThreadChoice(most), seconds.__getitem__, 4000)
    assert set(used[1000:]) <= seconds.keys()
    assert used[1000:].count(best) > 0.97 * 3000


def test_a_loser_is_tried_more_and_more_rarely() -> None:
    used = run(ThreadChoice(2), {1: 1.0, 2: 5.0}.__getitem__, 40_000)
    assert used.count(2) % TRIAL_RUNS == 0
    assert used.count(2) < TRIAL_RUNS * (8 + 40_000 / LONGEST_WAIT)
    assert used[-10_000:].count(2) <= 3 * TRIAL_RUNS


def test_other_programs_come_and_go() -> None:
    choice = ThreadChoice(2)
    quiet, busy = {1: 1.0, 2: 0.7}, {1: 1.2, 2: 6.0}
    assert run(choice, quiet.__getitem__, 2000)[-1] == 2
    soon = run(choice, busy.__getitem__, 2 * FIRST_WAIT)
    assert soon[-1] == 1, "what has become slow is given up soon, however long the next trial was to wait"
    assert run(choice, quiet.__getitem__, 2 * LONGEST_WAIT)[-1] == 2


def test_a_single_slow_run_changes_nothing() -> None:
    disturbed, twin = ThreadChoice(2), ThreadChoice(2)
    for choice in (disturbed, twin):
        run(choice, {1: 1.0, 2: 0.7}.__getitem__, 500)
    disturbed.took(100.0)
    twin.took(0.7)
    assert run(disturbed, {1: 1.0, 2: 0.7}.__getitem__, 500) == run(twin, {1: 1.0, 2: 0.7}.__getitem__, 500)


def test_torch_is_given_back_its_threads() -> None:
    choices, before = ThreadChoices(), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with choices.running(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 4
        with pytest.raises(ZeroDivisionError), choices.running(1):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 4
        seen = set()
        for _ in range(FIRST_WAIT):
            with choices.running(1):
                seen.add(torch.get_num_threads())
        with choices.running(5):
            assert torch.get_num_threads() == 1, "other rows are another kind of run"
        assert seen == {1, 2}
    finally:
        torch.set_num_threads(before)
