"""From an ordinary thread (torch, a notebook) into the trio thread and back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TypeVar, TypeVarTuple

import trio

T = TypeVar("T")
Args = TypeVarTuple("Args")

_home: ContextVar[trio.lowlevel.TrioToken | None] = ContextVar("_home", default=None)


class Portal:
    """Runs async functions in the trio thread it was made in, called from any other thread.

    A thread started through `run_sync` below belongs to the task that started it: when that task is cancelled, the
    next `run` in the thread raises `trio.Cancelled`, and the thread unwinds like the task would. Other threads (a
    notebook's) have no such owner, and their calls run to their end.
    """

    def __init__(self) -> None:
        self.token = trio.lowlevel.current_trio_token()

    def run(self, function: Callable[[*Args], Awaitable[T]], *args: *Args) -> T:
        """Await `function(*args)` in the trio thread; blocks the calling thread."""
        if _home.get() is self.token:
            return trio.from_thread.run(function, *args)
        return trio.from_thread.run(function, *args, trio_token=self.token)

    async def run_sync(self, function: Callable[[*Args], T], *args: *Args) -> T:
        """Call `function(*args)` in a worker thread that may use `run`."""
        reset = _home.set(self.token)  # worker threads inherit the context
        try:
            return await trio.to_thread.run_sync(function, *args)
        finally:
            _home.reset(reset)
