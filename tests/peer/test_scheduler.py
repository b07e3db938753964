"""The compute lane: order, cancellation, errors. Real threads, held back by events instead of time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from petals.peer.engine.scheduler import Lane, Priority
from petals.protocols.types import PeerId


class Gate:
    """A job that runs until it is let go."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.release = threading.Event()
        self.ended = False

    def __call__(self) -> None:
        self.started.set()
        assert self.release.wait(30)
        self.ended = True


@pytest.fixture
async def lane(nursery: trio.Nursery) -> Lane:
    lane = Lane()
    nursery.start_soon(lane.run)
    return lane


async def test_waiting_jobs_run_by_priority_then_by_age(lane: Lane) -> None:
    gate, order = Gate(), list[str]()

    def job(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.submit, Priority.BACKWARD, gate)
        await trio.to_thread.run_sync(gate.started.wait)
        for priority, name in (
            (Priority.BACKWARD, "backward"),
            (Priority.PREFILL, "prefill 1"),
            (Priority.DECODE, "decode 1"),
            (Priority.FORWARD, "forward"),
            (Priority.DECODE, "decode 2"),
            (Priority.PREFILL, "prefill 2"),
        ):
            nursery.start_soon(lane.submit, priority, job(name))
            await wait_all_tasks_blocked()
        assert lane.queued == 6
        gate.release.set()
    assert order == ["decode 1", "decode 2", "prefill 1", "prefill 2", "forward", "backward"]


async def test_a_crowd_of_one_peers_jobs_holds_nobody_up(nursery: trio.Nursery) -> None:
    lane = Lane(favoured=frozenset({PeerId("mine")}))
    nursery.start_soon(lane.run)
    gate, order = Gate(), list[str]()
    async with trio.open_nursery() as jobs:
        jobs.start_soon(lane.submit, Priority.DECODE, gate)
        await trio.to_thread.run_sync(gate.started.wait)
        for name, cost in (("a", 1), ("a", 1), ("a", 1), ("b", 1), ("c", 3), ("c", 3), ("mine", 50), ("b", 1)):
            work = partial(order.append, name)
            jobs.start_soon(partial(lane.submit, Priority.DECODE, work, peer_id=PeerId(name), cost=cost))
            await wait_all_tasks_blocked()
        gate.release.set()
    assert order == ["mine", "a", "b", "c", "a", "b", "a", "c"]
    assert (await lane.submit(Priority.DECODE, lambda: 5, peer_id=PeerId("a"))).value == 5
    assert len(lane._clocks) <= 3  # peers that owe nothing are forgotten


async def test_a_job_cancelled_while_waiting_never_runs(lane: Lane) -> None:
    gate, ran = Gate(), list[int]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lane.submit, Priority.DECODE, gate)
        await trio.to_thread.run_sync(gate.started.wait)
        with trio.CancelScope() as scope:
            scope.cancel()
            await lane.submit(Priority.DECODE, lambda: ran.append(1))
        assert scope.cancelled_caught
        gate.release.set()
    await lane.submit(Priority.BACKWARD, lambda: None)
    assert ran == []


async def test_a_job_cancelled_while_running_is_waited_for(lane: Lane) -> None:
    gate = Gate()
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def submit() -> None:
            with scope:
                await lane.submit(Priority.DECODE, gate)
            assert gate.ended, "the cache would have been given back under a running step"

        nursery.start_soon(submit)
        await trio.to_thread.run_sync(gate.started.wait)
        scope.cancel()
        await wait_all_tasks_blocked()
        assert not gate.ended
        gate.release.set()
    assert scope.cancelled_caught


async def test_an_error_reaches_the_asker_and_the_lane_goes_on(lane: Lane) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await lane.submit(Priority.DECODE, fail)
    assert (await lane.submit(Priority.DECODE, lambda: 7)).value == 7
