"""One priority queue in front of one compute thread.

Decode steps go first, then prefill, then forward, then backward. Among equals whoever is favoured goes first, and the
others by start-time fair queueing (Goyal et al. 1996): each peer has a clock that its jobs push forward by their cost,
and the job that started earliest by its peer's clock is next. So a peer with a hundred jobs delays one with one job
by one of them, not by a hundred; a peer that comes back has saved nothing up.

Two rules make cancellation safe: a job that is cancelled while it waits never runs, and one that is running is waited
for, because it writes into a cache that must not be leased to somebody else before it has stopped.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import outcome
import trio

from petals.protocols.types import PeerId

T = TypeVar("T")

NOBODY = PeerId("")
"""The server's own jobs."""
QUEUE_MEMORY_S = 20.0
"""How fast the smoothed queue delay forgets."""


class Priority(enum.IntEnum):
    DECODE = 0
    PREFILL = 1
    FORWARD = 2
    BACKWARD = 3


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """A result and where its time went, in seconds."""

    value: T
    queue_s: float
    compute_s: float


@dataclass(eq=False)
class _Job:
    work: Callable[[], Any]
    finished: trio.Event = field(default_factory=trio.Event)
    outcome: outcome.Outcome[Any] | None = None
    started_at: float | None = None
    ended_at: float = 0.0
    cancelled: bool = False


class Lane:
    """Runs jobs one at a time. `run()` must be running for `submit()` to return."""

    def __init__(self, favoured: frozenset[PeerId] = frozenset()) -> None:
        """`favoured`: peers whose jobs go before others of the same priority."""
        self._favoured = favoured
        self._heap: list[tuple[int, bool, float, int, _Job]] = []
        self._now = 0.0
        """The fair queue's time: where the job that was taken last had started."""
        self._clocks: dict[PeerId, float] = {}
        self._order = itertools.count()
        self._wake_up = trio.Event()
        self._limiter = trio.CapacityLimiter(1)
        self.busy_s = 0.0
        """Seconds of compute so far."""
        self._delay_s = 0.0
        self._delay_at = -math.inf

    @property
    def queued(self) -> int:
        return sum(not entry[-1].cancelled for entry in self._heap)

    def queue_s(self) -> float:
        """How long jobs wait for the thread, smoothed over time; an idle lane forgets."""
        return self._delay_s * math.exp(-(trio.current_time() - self._delay_at) / QUEUE_MEMORY_S)

    def _note_delay(self, waited_s: float) -> None:
        now = trio.current_time()
        kept = math.exp(-(now - self._delay_at) / QUEUE_MEMORY_S) * 0.9
        self._delay_s = kept * self._delay_s + (1 - kept) * waited_s
        self._delay_at = now

    async def submit(
        self, priority: Priority, work: Callable[[], T], *, peer_id: PeerId = NOBODY, cost: float = 1.0
    ) -> Timed[T]:
        """Run `work()` in the compute thread when its turn comes. What it raises is raised here.

        Args:
            peer_id: for whom; cost: how much it takes of that peer's share, in tokens.
        """
        job = _Job(work)
        asked_at = trio.current_time()
        start = max(self._now, self._clocks.get(peer_id, 0.0))
        self._clocks[peer_id] = start + cost
        favour = peer_id not in self._favoured
        heapq.heappush(self._heap, (priority, favour, start, next(self._order), job))
        self._wake_up.set()
        try:
            await job.finished.wait()
        except trio.Cancelled:
            job.cancelled = True
            if job.started_at is not None:
                with trio.CancelScope(shield=True):
                    await job.finished.wait()
            raise
        if job.outcome is None or job.started_at is None:
            raise trio.ClosedResourceError("the compute lane has stopped")
        self._note_delay(job.started_at - asked_at)
        value: T = job.outcome.unwrap()
        return Timed(value, job.started_at - asked_at, job.ended_at - job.started_at)

    async def run(self) -> None:
        """Serve the queue until cancelled; returns only once the running job has ended."""
        while True:
            while not self._heap:
                self._wake_up = trio.Event()
                await self._wake_up.wait()
            _, _, start, _, job = heapq.heappop(self._heap)
            if job.cancelled:
                continue
            self._now = max(self._now, start)
            self._clocks = {peer_id: clock for peer_id, clock in self._clocks.items() if clock > self._now}
            await self._execute(job)

    async def _execute(self, job: _Job) -> None:
        job.started_at = trio.current_time()
        try:
            # Captured in the thread: an error belongs to whoever asked, not to the lane.
            job.outcome = await trio.to_thread.run_sync(partial(outcome.capture, job.work), limiter=self._limiter)
        finally:
            job.ended_at = trio.current_time()
            self.busy_s += job.ended_at - job.started_at
            job.finished.set()
