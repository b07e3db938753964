"""The compute thread: one, in order, with all the cores, while the loop's thread keeps to one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import trio

from petals.peer.engine.compute_thread import ComputeThread


@pytest.fixture
def three_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


async def test_everything_runs_in_one_thread_that_has_all_cores(three_cores: None) -> None:
    one, two = ComputeThread(), ComputeThread()
    async with one.running():
        names = {await one.run(threading.get_ident) for _ in range(5)}
        assert len(names) == 1
        assert threading.get_ident() not in names
        assert await one.run(torch.get_num_threads) == 3
        assert torch.get_num_threads() == 1
        assert await _in_a_new_thread(torch.get_num_threads) == 3  # other threads of the program keep their cores
        async with two.running():
            assert await two.run(threading.get_ident) not in names
            assert await two.run(torch.get_num_threads) == 3
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


async def _in_a_new_thread(function: Callable[[], int]) -> int:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    await trio.to_thread.run_sync(thread.join)
    return results[0]


async def test_an_error_is_the_askers() -> None:
    thread = ComputeThread()
    async with thread.running():
        with pytest.raises(ZeroDivisionError):
            await thread.run(lambda: 1 // 0)
        assert await thread.run(lambda: 7) == 7
    with pytest.raises(KeyError):  # as it is, not in a group
        async with thread.running():
            raise KeyError


async def test_what_has_begun_is_waited_for() -> None:
    thread, begun, release = ComputeThread(), threading.Event(), threading.Event()
    ended: list[bool] = []

    def work() -> None:
        begun.set()
        release.wait(30)
        ended.append(True)

    async with thread.running(), trio.open_nursery() as nursery:
        nursery.start_soon(thread.run, work)
        await trio.to_thread.run_sync(begun.wait)
        nursery.cancel_scope.cancel()
        release.set()
    assert ended == [True]
