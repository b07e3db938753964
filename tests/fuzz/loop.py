"""One event loop that outlives single inputs: starting trio for each would cost more than most decoders do."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import cache
from typing import TypeVar

import trio

from petals.peer.net.wire.loopback import LoopbackStream, loopback_pair
from petals.protocols.types import PeerId

T = TypeVar("T")

STRANGER, SELF = PeerId("stranger"), PeerId("self")
INPUT_S = 20.0
"""A decoder that has seen the end of its input and still waits after this long is stuck."""


class Loop:
    """A thread that runs trio until the process ends, and what was opened in it for all inputs."""

    def __init__(self) -> None:
        started = threading.Event()

        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            async with trio.open_nursery() as self._nursery:
                started.set()
                await trio.sleep_forever()

        threading.Thread(target=trio.run, args=(main,), name="fuzz-loop", daemon=True).start()
        started.wait()

    def run(self, what: Callable[[], Awaitable[T]]) -> T:
        """Await `what()` in the loop, for at most `INPUT_S`."""

        async def bounded() -> T:
            with trio.fail_after(INPUT_S):
                return await what()

        return trio.from_thread.run(bounded, trio_token=self._token)

    def enter(self, context: AbstractAsyncContextManager[T]) -> T:
        """Open something that stays open, in a task of its own."""

        async def hold(*, task_status: trio.TaskStatus[T]) -> None:
            async with context as opened:
                task_status.started(opened)
                await trio.sleep_forever()

        async def start() -> T:
            opened: T = await self._nursery.start(hold)
            return opened

        return trio.from_thread.run(start, trio_token=self._token)


@cache
def the_loop() -> Loop:
    """The one loop of this process."""
    return Loop()


async def played(data: bytes, who: PeerId = STRANGER) -> tuple[LoopbackStream, LoopbackStream]:
    """A stream from a stranger who said `data` and will say no more; the second end is the stranger's."""
    ours, theirs = loopback_pair(SELF, who)
    await theirs.write(data)
    await theirs.close_write()
    return ours, theirs
