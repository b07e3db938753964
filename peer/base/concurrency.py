"""Several calls at once, whose expected errors come back as values instead of exception groups."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import ParamSpec, TypeVar

import trio

from petals.protocols.errors import SwarmError

T = TypeVar("T")
P = ParamSpec("P")

_one_stranger = trio.CapacityLimiter(1)
"""Of the whole process: what strangers make us parse or verify takes one processor core at most, and in turns."""


async def apart(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `call` in a thread beside the event loop, one at a time in the process: for checks of a stranger's words that
    take more than a fraction of a millisecond. Waits for the thread even when cancelled."""
    return await trio.to_thread.run_sync(partial(call, *args, **kwargs), limiter=_one_stranger)


async def gather(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T | SwarmError]:
    """Await all calls concurrently. Result i is what call i returned, or the `SwarmError` it raised."""
    results: list[T | SwarmError | None] = [None] * len(calls)

    async def one(index: int) -> None:
        try:
            results[index] = await calls[index]()
        except SwarmError as error:
            results[index] = error

    async with trio.open_nursery() as nursery:
        for index in range(len(calls)):
            nursery.start_soon(one, index)
    return results  # type: ignore[return-value]  # every place has been filled


async def together(first: Callable[[], Awaitable[object]], second: Callable[[], Awaitable[T]]) -> T:
    """Await both concurrently and return what `second` returned; an error of either ends both and is raised."""
    failed: list[SwarmError] = []
    result: list[T] = []

    async with trio.open_nursery() as nursery:

        async def guarded(call: Callable[[], Awaitable[object]]) -> None:
            try:
                await call()
            except SwarmError as error:
                failed.append(error)
                nursery.cancel_scope.cancel()

        async def keep() -> None:
            result.append(await second())

        nursery.start_soon(guarded, first)
        nursery.start_soon(guarded, keep)
    if failed:
        raise failed[0]
    return result[0]


def shielded_for(seconds: float) -> trio.CancelScope:
    """At most `seconds` that no cancellation from outside can cut short: for goodbyes."""
    scope = trio.move_on_after(seconds)
    scope.shield = True
    return scope
