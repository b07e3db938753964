"""What people see while something takes long: nothing at all for two seconds, then how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 2.0
"""Quicker work is not worth a line, nor is news that is younger."""


class Passing(str):
    """A line that only matters until the next one: a terminal overwrites it."""

    __slots__ = ()


class Meter:
    """Tells how much of some work is done, every `EVERY_S` seconds at most."""

    def __init__(
        self,
        progress: Callable[[str], None] | None,
        what: str,
        total: float,
        unit: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress, self._what, self._total, self._unit, self._clock = progress, what, total, unit, clock
        self._began = self._told = clock()

    def note(self, done: float) -> None:
        """So much of `total` is done."""
        now = self._clock()
        if self._progress is not None and now - self._told >= EVERY_S and done < self._total:
            self._told = now
            share = f"{done / self._total:.0%} of {self._total:,.0f} {self._unit}"
            self._progress(Passing(f"{self._what}: {share}, {now - self._began:.0f} s"))


@contextmanager
def counting_seconds(progress: Callable[[str], None] | None, what: str) -> Iterator[None]:
    """For work that does not say how far it is: how long it has taken, until the context is left."""
    if progress is None:
        yield
        return
    over = threading.Event()

    def count() -> None:
        began = time.monotonic()
        while not over.wait(EVERY_S):
            progress(Passing(f"{what}: {time.monotonic() - began:.0f} s"))

    counter = threading.Thread(target=count, name="petals-progress", daemon=True)
    counter.start()
    try:
        yield
    finally:
        over.set()
        counter.join()
