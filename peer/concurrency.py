"""Several calls at once, whose expected errors come back as values instead of exception groups."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio

from petals.protocols.errors import SwarmError

T = TypeVar("T")


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
