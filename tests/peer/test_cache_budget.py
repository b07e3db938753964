"""The cache budget: nothing is lost, nobody waits longer than said, first come first served."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from petals.peer.engine.cache_budget import CacheBudget, Lease, NoRoom
from petals.protocols.types import PeerId

ALICE, BOB = PeerId("alice"), PeerId("bob")


async def test_a_lease_comes_back_once() -> None:
    budget = CacheBudget(100)
    lease = await budget.acquire(ALICE, 60, 0)
    assert budget.left_bytes == 40
    lease.release()
    lease.release()
    assert budget.left_bytes == 100


async def test_a_full_budget_refuses_after_the_wait_and_keeps_nothing(autojump_clock: MockClock) -> None:
    budget = CacheBudget(100)
    with await budget.acquire(ALICE, 60, 0):
        started = trio.current_time()
        with pytest.raises(NoRoom) as caught:
            await budget.acquire(BOB, 60, 7)
        assert trio.current_time() - started == 7
        assert not caught.value.for_ever
        assert budget.left_bytes == 40
    assert budget.left_bytes == 100
    assert budget.waiting == 0


async def test_memory_that_other_programs_took_is_not_leased() -> None:
    left = 100.0
    budget = CacheBudget(100, leasable_bytes=lambda: left)
    with await budget.acquire(ALICE, 60, 0):
        left = 30.0
        with pytest.raises(NoRoom, match="30 bytes are left") as caught:
            await budget.acquire(BOB, 40, 60)
        assert not caught.value.for_ever
        with await budget.acquire(BOB, 30, 0):
            left = -5.0
            with pytest.raises(NoRoom, match="of which 0 bytes are left"):
                await budget.acquire(BOB, 1, 60)
    assert budget.left_bytes == 100
    assert not budget.waiting


async def test_what_can_never_fit_is_refused_at_once() -> None:
    with pytest.raises(NoRoom) as caught:
        await CacheBudget(100).acquire(ALICE, 101, 1000)
    assert caught.value.for_ever


async def test_one_peer_can_not_take_everything() -> None:
    budget = CacheBudget(100, max_share=0.5)
    await budget.acquire(ALICE, 50, 0)
    with pytest.raises(NoRoom):
        await budget.acquire(ALICE, 1, 1000)
    await budget.acquire(BOB, 50, 0)


async def test_a_small_request_does_not_overtake_a_big_one(autojump_clock: MockClock) -> None:
    budget = CacheBudget(100)
    order: list[str] = []

    async def ask(name: str, nbytes: int) -> None:
        with await budget.acquire(PeerId(name), nbytes, 60):
            order.append(name)

    async with trio.open_nursery() as nursery:
        first = await budget.acquire(ALICE, 60, 0)
        nursery.start_soon(ask, "big", 95)
        await wait_all_tasks_blocked()
        nursery.start_soon(ask, "small", 10)
        await wait_all_tasks_blocked()
        assert order == []
        first.release()
    assert order == ["big", "small"]


async def test_a_big_request_that_gives_up_lets_the_small_one_through(autojump_clock: MockClock) -> None:
    budget = CacheBudget(100)
    async with trio.open_nursery() as nursery:
        with await budget.acquire(ALICE, 60, 0):

            async def give_up() -> None:
                with pytest.raises(NoRoom):
                    await budget.acquire(BOB, 80, 5)

            nursery.start_soon(give_up)
            await wait_all_tasks_blocked()
            lease = await budget.acquire(BOB, 10, 60)
            assert trio.current_time() == pytest.approx(5)
            lease.release()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 5), st.floats(0, 5), st.booleans()), max_size=12))
def test_after_any_schedule_of_waits_and_cancellations_every_byte_is_back(
    asks: list[tuple[int, float, float, bool]],
) -> None:
    async def scenario() -> None:
        budget = CacheBudget(100, max_share=0.8)

        async def ask(nbytes: int, wait_s: float, hold_s: float, cut: bool) -> None:
            with trio.move_on_after(hold_s / 2 if cut else 1000):
                try:
                    lease: Lease = await budget.acquire(ALICE if nbytes % 2 else BOB, nbytes, wait_s)
                except NoRoom:
                    return
                with lease:
                    assert budget.left_bytes >= 0
                    await trio.sleep(hold_s)

        async with trio.open_nursery() as nursery:
            for each in asks:
                nursery.start_soon(ask, *each)
        assert budget.left_bytes == 100
        assert budget.waiting == 0

    trio.run(scenario, clock=MockClock(autojump_threshold=0))
