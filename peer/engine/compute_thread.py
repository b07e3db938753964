"""The compute thread of a server: one, always the same, and the only one that multiplies with several cores.

OpenMP gives every thread that multiplies a team of its own. When there are more threads in teams than cores, libgomp
lets idle ones sleep at once instead of spinning for a moment, and every small product waits for a wake-up: a decode
step of SmolLM2 took 41 ms instead of 24 as soon as a second thread, the loader's or the loop's, had once used its team
(2 cores, torch 2.13, libgomp). So loading, testing and computing share one thread, and the loop's thread works alone.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache, partial
from typing import TypeVar

import outcome
import torch
import trio

T = TypeVar("T")
log = logging.getLogger(__name__)


@cache
def _remind_of_spinning() -> None:
    """Once: in a program that is not ours the environment is not set (cli/cores.py says what it saves)."""
    if sys.platform == "linux" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        log.info("torch's idle threads spin; to share cores, set GOMP_SPINCOUNT=3000 before torch is imported")


class ComputeThread:
    """Runs functions one after another, in order."""

    _running = 0
    """Compute threads of this process."""
    _cores = 1
    """What torch may use; told to every compute thread."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The thread lives as long as the context. Until then torch uses one core in the loop's thread.

        That is the thread of whoever runs `trio.run`: torch in other threads of a program that serves keeps its cores
        (tests/peer/test_compute_thread.py), but each that multiplies costs what is said above.
        """
        _remind_of_spinning()
        cls = type(self)
        if not cls._running:
            cls._cores = torch.get_num_threads()
            torch.set_num_threads(1)  # of this thread; it is also the default of threads to come, until the next line
        cls._running += 1
        ended, token = trio.Event(), trio.lowlevel.current_trio_token()
        # No nursery: it would wrap what goes wrong in the context.
        trio.lowlevel.start_thread_soon(partial(self._loop, cls._cores), lambda _: token.run_sync_soon(ended.set))
        try:
            yield
        finally:
            self._work.put(None)
            with trio.CancelScope(shield=True):
                await ended.wait()
            cls._running -= 1
            if not cls._running:
                torch.set_num_threads(cls._cores)

    def _loop(self, cores: int) -> None:
        torch.set_num_threads(cores)
        while (work := self._work.get()) is not None:
            work()

    def start(self, function: Callable[[], T], then: Callable[[outcome.Outcome[T]], None]) -> None:
        """Run `function()` when its turn comes; then `then`, which must not raise, in the loop of whoever called."""
        token = trio.lowlevel.current_trio_token()
        self._work.put(lambda: token.run_sync_soon(then, outcome.capture(function)))

    async def run(self, function: Callable[[], T]) -> T:
        """What `function()` returns or raises. Once begun it is waited for, cancelled or not."""
        done = trio.Event()
        results: list[outcome.Outcome[T]] = []

        def then(result: outcome.Outcome[T]) -> None:
            results.append(result)
            done.set()

        self.start(function, then)
        with trio.CancelScope(shield=True):
            await done.wait()
        return results[0].unwrap()
