"""The queue: fair among keys and connections, bounded, and left by whoever hangs up."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from petals.gateway.errors import ApiError
from petals.gateway.waiting import WaitingLine
from tests.gateway.conftest import COLOURS, NAME, Door, OpenDoor
from tests.swarm.conftest import all_leases_returned

LONG = {"model": NAME, "messages": COLOURS, "max_tokens": 800}


class Order:
    """Who is admitted when; each stays until it is let go."""

    def __init__(self, nursery: trio.Nursery, line: WaitingLine) -> None:
        self.admitted: list[str] = []
        self._nursery = nursery
        self._line = line
        self._leave: dict[str, trio.CancelScope] = {}

    async def come(self, name: str, count: int = 1, **who: Any) -> None:
        self._nursery.start_soon(self._stay, name, count, who)
        await wait_all_tasks_blocked()

    async def _stay(self, name: str, count: int, who: dict[str, Any]) -> None:
        with trio.CancelScope() as self._leave[name]:
            async with self._line.admitted(count, **who):
                self.admitted.append(name)
                await trio.sleep_forever()

    async def go(self, *names: str) -> None:
        for name in names:
            self._leave[name].cancel()
            await wait_all_tasks_blocked()


async def test_keys_take_turns_and_connections_of_a_key(nursery: trio.Nursery) -> None:
    line = WaitingLine(1, 100, 100)
    order = Order(nursery, line)
    await order.come("first", key="a", connection=1)
    for name, key, connection in (
        ("a1", "a", 1), ("a1 again", "a", 1), ("a2", "a", 2), ("b", "b", 3), ("b again", "b", 3), ("c", "c", 4),
    ):  # fmt: skip
        await order.come(name, key=key, connection=connection)
    assert (line.running, line.waiting) == (1, 6)
    for name in ("first", "a1", "b", "c", "a2", "b again"):
        assert order.admitted[-1] == name
        await order.go(name)
    assert order.admitted == ["first", "a1", "b", "c", "a2", "b again", "a1 again"]
    nursery.cancel_scope.cancel()


async def test_a_large_request_is_not_passed_forever(nursery: trio.Nursery) -> None:
    line = WaitingLine(3, 100, 100)
    order = Order(nursery, line)
    await order.come("one", key="a")
    await order.come("three", count=3, key="b")
    await order.come("small", key="c")
    assert order.admitted == ["one"], "there would be room for the small one, which came later"
    await order.go("one")
    assert order.admitted == ["one", "three"]
    await order.go("three")
    assert order.admitted == ["one", "three", "small"]
    nursery.cancel_scope.cancel()


async def test_a_key_at_its_limit_does_not_hold_up_others(nursery: trio.Nursery) -> None:
    line = WaitingLine(3, 100, 100)
    order = Order(nursery, line)
    for name in ("a", "a again"):
        await order.come(name, key="a", limit=1)
    await order.come("b", key="b")
    assert order.admitted == ["a", "b"]
    await order.go("a")
    assert order.admitted == ["a", "b", "a again"]
    with pytest.raises(ApiError, match="at most 1"):
        async with line.admitted(2, key="a", limit=1):
            pass
    nursery.cancel_scope.cancel()


async def test_who_leaves_makes_room_and_a_full_line_refuses(nursery: trio.Nursery) -> None:
    line = WaitingLine(1, 2, 100)
    order = Order(nursery, line)
    for name in ("runs", "waits", "waits too"):
        await order.come(name)
    with pytest.raises(ApiError, match="2 requests wait already") as caught:
        async with line.admitted(1):
            pass
    assert caught.value.status == 429
    await order.go("waits")
    assert line.waiting == 1
    await order.go("runs")
    assert order.admitted == ["runs", "waits too"]
    await order.go("waits too")
    assert (line.running, line.waiting) == (0, 0)


async def test_a_request_waits_only_so_long(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    line = WaitingLine(1, 10, 30)
    waits: list[float] = []
    line.on_wait = waits.append
    async with line.admitted(1):
        with pytest.raises(ApiError, match="waited 30 s") as caught:
            async with line.admitted(1):
                pass
        assert caught.value.status == 429
        assert caught.value.retry_after_s
    assert (line.running, line.waiting) == (0, 0)
    assert waits == [0]


async def metric(door: Door, text: str) -> None:
    with trio.fail_after(60):
        while text not in (await door.get("/metrics")).text:
            pass


async def test_requests_wait_for_their_turn_and_may_leave(open_door: OpenDoor) -> None:
    async with open_door(max_answers=1) as door:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(door.post, "/v1/chat/completions", LONG)
            await metric(door, "vllm:num_requests_running 1\n")
            async with trio.open_nursery() as second:
                second.start_soon(door.post, "/v1/chat/completions", LONG)
                await metric(door, "vllm:num_requests_waiting 1\n")
                assert (await door.get("/api/swarm")).json()["answers"]["waiting"] == 1
                second.cancel_scope.cancel()  # its client hangs up
            await metric(door, "vllm:num_requests_waiting 0\n")
            answers: list[httpx.Response] = []

            async def ask() -> None:
                answers.append(await door.post("/v1/chat/completions", LONG | {"max_tokens": 2}))

            async with trio.open_nursery() as third:
                third.start_soon(ask)
                await metric(door, "vllm:num_requests_waiting 1\n")
                nursery.cancel_scope.cancel()  # the running one hangs up: there is room
        assert answers == [] or answers[0].status_code == 200
        answer = await door.post("/v1/chat/completions", LONG | {"max_tokens": 2})
        assert answer.status_code == 200
        await all_leases_returned(door.server)
        assert "vllm:request_queue_time_seconds_count" in (await door.get("/metrics")).text
