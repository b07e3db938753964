"""Work that shares passes: who goes together, whose error is whose, who is waited for."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import outcome
import pytest
import torch
import trio
from torch import Tensor
from trio.testing import wait_all_tasks_blocked

from petals.models.blocks.block import BlockSpan
from petals.models.errors import CacheFull, StepError
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from petals.peer.engine import steps
from petals.peer.engine.scheduler import Lane, Priority, SharedWork, Visitor, back_by, next_piece
from petals.peer.engine.steps import StepWork
from tests.models.tiny import BLOCKS, CASES, HIDDEN, save_tiny


@pytest.fixture(scope="module")
def llama_span(tmp_path_factory: pytest.TempPathFactory) -> BlockSpan:
    directory = tmp_path_factory.mktemp("llama")
    save_tiny(next(case for case in CASES if case.id == "llama"), directory)
    return load_span(open_checkpoint(directory), range(BLOCKS))


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(1, 2, HIDDEN, generator=torch.Generator().manual_seed(1))


class Work(SharedWork):
    """Remembers which works were done together."""

    passes: list[list[str]]

    def __init__(self, name: str, passes: list[list[str]], rows: int = 1) -> None:
        self._name, self._rows, self._passes = name, rows, passes

    @property
    def rows(self) -> int:
        return self._rows

    def __call__(self) -> str:
        self._passes.append([self._name])
        return self._name

    @classmethod
    def together(cls, works: Sequence[Self]) -> list[outcome.Outcome[Any]]:
        works[0]._passes.append([work._name for work in works])
        return [
            outcome.Error(ZeroDivisionError()) if work._name == "bad" else outcome.Value(work._name) for work in works
        ]


@pytest.mark.parametrize("pass_rows", [0, 4])
async def test_what_waits_goes_together(nursery: trio.Nursery, pass_rows: int) -> None:
    lane = Lane(pass_rows=pass_rows)
    nursery.start_soon(lane.run)
    passes: list[list[str]] = []
    got: dict[str, Any] = {}
    release = threading.Event()

    async def ask(name: str, priority: Priority, rows: int = 1) -> None:
        try:
            got[name] = (await lane.submit(priority, Work(name, passes, rows))).value
        except ZeroDivisionError:
            got[name] = "error"

    async with trio.open_nursery() as asking:
        asking.start_soon(lane.submit, Priority.DECODE, release.wait)
        await wait_all_tasks_blocked()
        asking.start_soon(ask, "prompt", Priority.PREFILL)
        await wait_all_tasks_blocked()
        asking.start_soon(lane.submit, Priority.FORWARD, lambda: passes.append(["forward"]))
        for name, rows in (("a", 1), ("wide", 3), ("b", 1)):
            asking.start_soon(ask, name, Priority.DECODE, rows)
            await wait_all_tasks_blocked()
        if pass_rows:
            asking.start_soon(ask, "bad", Priority.PREFILL)
            await wait_all_tasks_blocked()
        release.set()
    if pass_rows:
        assert passes == [["a", "wide"], ["b", "prompt", "bad"], ["forward"]]
        assert got.pop("bad") == "error"
    else:
        assert passes == [["a"], ["wide"], ["b"], ["prompt"], ["forward"]]
    assert got == {name: name for name in ("a", "wide", "b", "prompt")}


async def test_who_is_cancelled_while_waiting_does_not_join(nursery: trio.Nursery) -> None:
    lane = Lane(pass_rows=8)
    nursery.start_soon(lane.run)
    passes: list[list[str]] = []
    release = threading.Event()
    async with trio.open_nursery() as asking:
        asking.start_soon(lane.submit, Priority.DECODE, release.wait)
        await wait_all_tasks_blocked()
        with trio.move_on_after(0):
            await lane.submit(Priority.DECODE, Work("gone", passes))
        asking.start_soon(lane.submit, Priority.DECODE, Work("a", passes))
        asking.start_soon(lane.submit, Priority.DECODE, Work("b", passes))
        await wait_all_tasks_blocked()
        release.set()
    assert [sorted(names) for names in passes] == [["a", "b"]]


async def test_sessions_in_step_share_all_their_passes_and_get_their_own_answers(nursery: trio.Nursery) -> None:
    lane = Lane(pass_rows=8)
    nursery.start_soon(lane.run)
    passes: list[list[str]] = []

    async def session(name: str) -> None:
        visitor = Visitor()
        for _ in range(50):
            done = await lane.submit(Priority.DECODE, Work(name, passes), visitor=visitor)
            assert done.value == name

    async with trio.open_nursery() as sessions:
        for name in "abc":
            sessions.start_soon(session, name)
    assert sorted(name for names in passes for name in names) == sorted("abc" * 50)
    assert lane.piece_rows(Visitor(), 512) < 512  # they were decoding a moment ago


async def test_steps_that_come_in_the_same_breath_share_a_pass(nursery: trio.Nursery) -> None:
    """Far sessions, for which no pass waits, whose steps travel together."""
    lane = Lane(pass_rows=8)
    nursery.start_soon(lane.run)
    passes: list[list[str]] = []
    visitors = {name: Visitor() for name in "abc"}
    for name, visitor in visitors.items():
        await lane.submit(Priority.DECODE, Work(name, passes), visitor=visitor)
    for visitor in visitors.values():
        visitor.left_at -= 1.0
    passes.clear()
    async with trio.open_nursery() as sessions:
        for name, visitor in visitors.items():
            sessions.start_soon(partial(lane.submit, Priority.DECODE, Work(name, passes), visitor=visitor))
    assert [sorted(names) for names in passes] == [["a", "b", "c"]]


async def test_a_fault_of_the_pass_is_everybodys_and_the_lane_goes_on(nursery: trio.Nursery) -> None:
    class Faulty(Work):
        @classmethod
        def together(cls, works: Sequence[Self]) -> list[outcome.Outcome[Any]]:
            raise MemoryError

    lane = Lane(pass_rows=8)
    nursery.start_soon(lane.run)
    failed: list[str] = []
    release = threading.Event()

    async def ask(name: str) -> None:
        try:
            await lane.submit(Priority.DECODE, Faulty(name, []))
        except MemoryError:
            failed.append(name)

    async with trio.open_nursery() as asking:
        asking.start_soon(lane.submit, Priority.DECODE, release.wait)
        await wait_all_tasks_blocked()
        asking.start_soon(ask, "a")
        asking.start_soon(ask, "b")
        await wait_all_tasks_blocked()
        release.set()
    assert sorted(failed) == ["a", "b"]
    assert (await lane.submit(Priority.DECODE, lambda: 7)).value == 7


def test_who_is_waited_for() -> None:
    soon = Visitor(left_at=10.0, gap_s=0.001)
    assert back_by([soon], 10.0, 0.1) == pytest.approx(10.002)
    assert back_by([soon, Visitor(left_at=10.0, gap_s=0.02)], 10.0, 0.1) == pytest.approx(10.025)  # at most
    assert back_by([Visitor(left_at=10.0, gap_s=0.03)], 10.0, 0.1) == -math.inf  # too slow to wait for
    assert back_by([Visitor(waiting=True, left_at=10.0, gap_s=0.001)], 10.0, 0.1) == -math.inf
    assert back_by([Visitor()], 10.0, 0.1) == -math.inf  # nobody knows


def test_prompts_take_their_share_of_a_pass() -> None:
    """Whatever rows cost, the pieces settle where a mixed pass takes up to twice the time of a decode step."""
    for row_cost in (0.005, 0.03, 0.1, 0.4):
        rows = 4
        for _ in range(20):
            rows = next_piece(rows, 1.0 + row_cost * rows, 1.0)
        assert rows in (2, 64) or 1.3 <= 1.0 + row_cost * rows <= 1.7
    assert next_piece(2, 100.0, 1.0) == 2


async def test_alone_nobodys_prompt_is_cut(nursery: trio.Nursery) -> None:
    lane = Lane(pass_rows=8)
    nursery.start_soon(lane.run)
    mine = Visitor()
    await lane.submit(Priority.DECODE, Work("a", []), visitor=mine)
    assert lane.piece_rows(mine, 512) == 512


def test_a_step_that_fails_costs_nobody_else_theirs(llama_span: BlockSpan, noise: Tensor) -> None:
    truth = [llama_span.step(noise, llama_span.new_cache(range(BLOCKS), 1, 8)) for _ in range(2)]
    caches = [llama_span.new_cache(range(BLOCKS), 1, length) for length in (8, 1, 8)]
    works = [StepWork(llama_span, cache, 0, {"hidden": noise}, None) for cache in caches]
    results = StepWork.together(works)
    assert isinstance(results[1], outcome.Error)
    assert isinstance(results[1].error, CacheFull)
    for result in (results[0], results[2]):
        assert (result.unwrap() - truth[0]).abs().max() < 1e-4


def test_a_pass_that_breaks_is_done_one_by_one_and_the_log_says_why_once(
    llama_span: BlockSpan, noise: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(*_: object) -> None:
        raise StepError("a pass of ours")

    monkeypatch.setattr(llama_span, "step_together", breaks)
    monkeypatch.setattr(steps, "_reported", set())
    for _ in range(3):
        caches = [llama_span.new_cache(range(BLOCKS), 1, 8) for _ in range(2)]
        results = StepWork.together([StepWork(llama_span, cache, 0, {"hidden": noise}, None) for cache in caches])
        assert all(isinstance(result, outcome.Value) for result in results)
        assert [cache.position for cache in caches] == [noise.shape[1]] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "a pass of 2 steps failed and is run again, step by step: StepError: a pass of ours"
    ]


def test_steps_of_padded_batches_go_together_once_their_padding_is_old(llama_span: BlockSpan) -> None:
    hidden = torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    alone = llama_span.new_cache(range(BLOCKS), 2, 8)
    truth = [llama_span.step(hidden[:, :3], alone, attention_mask=mask[:, :3])]
    with llama_span.library_path():
        truth.append(llama_span.step(hidden[:, 3:], alone, attention_mask=mask))
    caches = [llama_span.new_cache(range(BLOCKS), 2, 8) for _ in range(2)]
    prompt = {"hidden": hidden[:, :3], "attention_mask": mask[:, :3]}
    for cache in caches:
        work = StepWork(llama_span, cache, 0, prompt, None)
        assert not work.can_join
        assert torch.equal(work.alone(), truth[0])
    works = [
        StepWork(llama_span, caches[0], 3, {"hidden": hidden[:, 3:], "attention_mask": mask}, None),
        StepWork(llama_span, caches[1], 3, {"hidden": hidden[:, 3:]}, None),
    ]
    assert all(work.can_join for work in works)
    padded, whole = (result.unwrap() for result in StepWork.together(works))
    assert (padded - truth[1]).abs().max() < 1e-4
    assert (whole[0] - padded[0]).abs().max() > 1e-2
    assert (whole[1] - padded[1]).abs().max() < 1e-4
