"""How many threads a computation gets that is run over and over: as many as pay, here and now.

One core reads half-width weights nearly as fast as all of them do on a small machine, and a third as fast on a large
one. And threads wait for each other at every product, dozens of times a token: one that another program has put off its
core for a few milliseconds stops the others, who spin. Two servers and a client on two cores, or a browser beside a
server, make two threads slower than one - five times as slow was seen. None of that can be known beforehand, so it is
tried: for a few runs now and then, rarely where it does not pay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter

import torch

TRIAL_RUNS = 5
"""Runs with another number of threads, the first of which does not count: it wakes threads, or sends them to sleep."""
FIRST_WAIT, LONGEST_WAIT = 32, 4096
"""Runs between trials; twice as many after each that lost."""
_WORTH = 0.93
"""What another number must take of the present one's time to replace it."""
_WORSE = 1.4
"""How much slower than when it was chosen the present number must have become for the waiting to be forgotten."""


class ThreadChoice:
    """Of one kind of run. Ask for `threads` before each, tell `took` after it. Has no clock of its own."""

    def __init__(self, most: int) -> None:
        """`most`: the largest number of threads to try."""
        self._numbers = [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]
        self._chosen = self._running = 0
        self._recent: deque[float] = deque(maxlen=8)
        self._trial: list[float] = []
        self._usual: float | None = None
        self._wait = FIRST_WAIT
        self._left = TRIAL_RUNS
        self._upwards = True

    @property
    def threads(self) -> int:
        """For the next run."""
        return self._numbers[self._running]

    def took(self, seconds: float) -> None:
        """How long the run took."""
        if len(self._numbers) == 1:
            return
        if self._running != self._chosen:
            self._trial.append(seconds)
            if len(self._trial) == TRIAL_RUNS:
                self._judge()
            return
        self._recent.append(seconds)
        self._left -= 1
        now = median(self._recent)
        if self._usual is None or now < self._usual:
            self._usual = now
        elif now > _WORSE * self._usual and self._left > FIRST_WAIT:
            self._wait = self._left = FIRST_WAIT  # the machine has other work now
        if self._left <= 0:
            self._running = self._neighbour()

    def _neighbour(self) -> int:
        last = len(self._numbers) - 1
        if not 0 < self._chosen < last:
            return 1 if self._chosen == 0 else last - 1
        self._upwards = not self._upwards
        return self._chosen + (1 if self._upwards else -1)

    def _judge(self) -> None:
        tried = median(self._trial[1:])
        if tried < _WORTH * median(self._recent):
            self._chosen, self._wait, self._usual = self._running, FIRST_WAIT, tried
            self._recent.clear()
        else:
            self._wait = min(2 * self._wait, LONGEST_WAIT)
        self._trial = []
        self._running, self._left = self._chosen, self._wait


class ThreadChoices:
    """A `ThreadChoice` for each kind of run: few rows are bound by memory, more of them by arithmetic."""

    def __init__(self) -> None:
        self._choices: dict[tuple[int, int], ThreadChoice] = {}

    @contextmanager
    def running(self, rows: int) -> Iterator[None]:
        """Run what is inside, one run, with the threads that are chosen for so many rows; at most with torch's present
        number in this thread, which is restored."""
        before = torch.get_num_threads()
        if before == 1:
            yield
            return
        kind = (before, (rows - 1).bit_length())
        choice = self._choices.get(kind) or self._choices.setdefault(kind, ThreadChoice(before))
        torch.set_num_threads(choice.threads)
        began = perf_counter()
        try:
            yield
            choice.took(perf_counter() - began)
        finally:
            torch.set_num_threads(before)
