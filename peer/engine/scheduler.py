"""One priority queue in front of one compute thread.

Decode steps go first, then prefill, then forward, then backward. Among equals whoever is favoured goes first, and the
others by start-time fair queueing (Goyal et al. 1996): each peer has a clock that its jobs push forward by their cost,
and the job that started earliest by its peer's clock is next. So a peer with a hundred jobs delays one with one job
by one of them, not by a hundred; a peer that comes back has saved nothing up. The clock of a peer of weight two runs
half as fast, so that it has twice the share of one of weight one when there is more work than time.

Work that can share a pass does: when the thread is free, the first job takes along all others of its kind that are
waiting. Reading the weights is most of a step, so 16 sessions cost little more than two. A session that decodes comes
back a moment after its last step; if it usually comes soon, the next pass waits for it, because two sessions that take
turns would each wait for the other's whole pass.

A pass starts where the loop happens to be: in `submit` when the thread is free and nobody else can come along, or when
the last pass has ended. The task behind `run` only sleeps until somebody has been waited for long enough; so a session
that is alone goes from its stream to the thread and back without waking anybody on the way.

Two rules make cancellation safe: a job that is cancelled while it waits never runs, and one that is running is waited
for, because it writes into a cache that must not be leased to somebody else before it has stopped.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Self, TypeVar

import outcome
import trio

from petals.peer.engine.compute_thread import ComputeThread
from petals.protocols.types import PeerId

T = TypeVar("T")

NOBODY = PeerId("")
"""The server's own jobs."""
QUEUE_MEMORY_S = 20.0
"""How fast the smoothed queue delay forgets."""


GATHER_SHARE = 0.25
"""Part of a pass that may be spent waiting for those who are about to come back."""
DECODING_S = 2.0
"""Who had a decode step this recently is decoding."""
PIECE_ROWS = 2
"""Rows of a long prompt that travel with others' decode steps, to begin with."""


IDLE_SLICE_S = 0.2
"""How long a piece of a long job may hold the thread while nobody decodes: what the first decode step waits at most."""
SLICE_SHARE = 0.5
"""The same while somebody does, in decode steps."""
MIN_SLICE_S = 0.001


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
    """In the compute thread; the ways there and back are the loop's, and neither this nor that."""


class SharedWork(ABC):
    """Work that can be done together with more of its class, in one pass."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """How large a part of a pass it takes."""

    @abstractmethod
    def __call__(self) -> Any:
        """Do it alone."""

    @classmethod
    @abstractmethod
    def together(cls, works: Sequence[Self]) -> list[outcome.Outcome[Any]]:
        """Do all of it; each has its own result or error."""


@dataclass(eq=False)
class Visitor:
    """Somebody who comes with one job at a time, again and again: a session."""

    waiting: bool = False
    left_at: float = -math.inf
    gap_s: float = math.inf
    """How long it usually stays away between two decode steps."""

    def comes(self, now: float) -> None:
        gap = now - self.left_at
        self.gap_s = gap if math.isinf(self.gap_s) else 0.7 * self.gap_s + 0.3 * gap
        self.waiting = True


@dataclass(eq=False)
class _Job:
    work: Callable[[], Any]
    priority: Priority
    visitor: Visitor | None
    finished: trio.Event = field(default_factory=trio.Event)
    outcome: outcome.Outcome[Any] | None = None
    started_at: float | None = None
    compute_s: float = 0.0
    cancelled: bool = False


def all_alike(peer_id: PeerId) -> float:
    """The weight of every peer where none has earned more than another."""
    return 1.0


class Lane:
    """Runs jobs one pass at a time. `run()` must be running for `submit()` to return."""

    def __init__(
        self,
        favoured: frozenset[PeerId] = frozenset(),
        *,
        pass_rows: int = 0,
        thread: ComputeThread | None = None,
        weigh: Callable[[PeerId], float] = all_alike,
    ) -> None:
        """
        Args:
            thread: a running one to compute in; None: one of the lane's own.
            favoured: peers whose jobs go before others of the same priority.
            pass_rows: the most rows of one pass that work shares; 0: nothing is shared.
            weigh: peer -> its share of the thread, against others of the same priority; at least 1.
        """
        self._favoured = favoured
        self._weigh = weigh
        self._pass_rows = pass_rows
        self._visitors: set[Visitor] = set()
        """Who had a decode step lately."""
        self._pass_s = self._decode_s = self._step_s = 0.0
        """Smoothed duration of all passes that sessions may share, of those of them that only decode, and of all that
        only decode."""
        self._ended_at = -math.inf
        self._piece_rows = PIECE_ROWS
        self._heap: list[tuple[int, bool, float, int, _Job]] = []
        self._now = 0.0
        """The fair queue's time: where the job that was taken last had started."""
        self._clocks: dict[PeerId, tuple[float, float]] = {}
        """And how far each may be behind."""
        self._order = itertools.count()
        self._is_open = False
        self._idle = trio.Event()
        """Set while no pass is running."""
        self._idle.set()
        self._alarm = trio.CancelScope()
        """Of the task that sleeps; when it goes off, a pass begins."""
        self._own_thread = thread is None
        self._thread = thread or ComputeThread()
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

    def piece_rows(self, visitor: Visitor, most: int) -> int:
        """How many rows of a long prompt `visitor` should bring next: all it may while nobody else decodes."""
        if not self._pass_rows or not self._decoding(trio.current_time()) - {visitor}:
            return most
        return min(most, self._piece_rows)

    def slice_s(self) -> float:
        """How long the next piece of a forward or backward request may hold the thread, in seconds."""
        if not self._decoding(trio.current_time()):
            return IDLE_SLICE_S
        return min(IDLE_SLICE_S, max(MIN_SLICE_S, SLICE_SHARE * self._step_s))

    def _decoding(self, now: float) -> set[Visitor]:
        self._visitors = {
            visitor for visitor in self._visitors if visitor.waiting or now - visitor.left_at < DECODING_S
        }
        return self._visitors

    async def submit(
        self,
        priority: Priority,
        work: Callable[[], T],
        *,
        peer_id: PeerId = NOBODY,
        cost: float = 1.0,
        visitor: Visitor | None = None,
    ) -> Timed[T]:
        """Run `work()` in the compute thread when its turn comes. What it raises is raised here.

        Args:
            work: a SharedWork may be done together with others.
            peer_id: for whom; cost: how much it takes of that peer's share, in tokens.
            visitor: who will come again.
        """
        job = _Job(work, priority, visitor)
        asked_at = trio.current_time()
        if visitor is not None:
            visitor.comes(asked_at)
        weight = self._weigh(peer_id)
        # Who asks for one step at a time is away when its next turn comes: it may take that a moment later.
        lead = cost * (1 - 1 / weight)
        clock, _ = self._clocks.get(peer_id, (-math.inf, 0.0))
        start = max(self._now - lead, clock)
        self._clocks[peer_id] = (start + cost / weight, lead)
        favour = peer_id not in self._favoured
        heapq.heappush(self._heap, (priority, favour, start, next(self._order), job))
        self._begin(arrived=True)
        try:
            await job.finished.wait()
        except trio.Cancelled:
            job.cancelled = True
            if job.started_at is not None:
                with trio.CancelScope(shield=True):
                    await job.finished.wait()
            if visitor is not None:
                visitor.waiting = False
            raise
        assert job.outcome is not None
        assert job.started_at is not None
        self._note_delay(job.started_at - asked_at)
        value: T = job.outcome.unwrap()
        return Timed(value, job.started_at - asked_at, job.compute_s)

    async def run(self) -> None:
        """Serve the queue until cancelled; returns only once the running pass has ended."""
        async with self._thread.running() if self._own_thread else nullcontext():
            self._is_open = True
            try:
                while True:
                    self._alarm = trio.CancelScope()
                    self._begin()
                    with self._alarm:
                        await trio.sleep_forever()
            finally:
                self._is_open = False
                with trio.CancelScope(shield=True):
                    await self._idle.wait()

    def _begin(self, *, arrived: bool = False) -> None:
        """Start the next pass, unless one is running, or somebody is waited for: until the alarm goes off.

        Args:
            arrived: a job has just come; while sessions are away, others may come in the same breath.
        """
        while self._is_open and self._idle.is_set() and self._heap:
            now = trio.current_time()
            absent = [visitor for visitor in self._decoding(now) if not visitor.waiting] if self._pass_rows else []
            if absent:
                until = max(now, back_by(absent, self._ended_at, self._pass_s))
                if arrived or until > now:
                    self._alarm.deadline = until
                    return
            jobs = self._take()
            if jobs:
                self._execute(jobs)

    def _take(self) -> list[_Job]:
        """The next job, and those that share its pass. Empty when all were cancelled."""
        jobs: list[_Job] = []
        left: list[tuple[int, bool, float, int, _Job]] = []
        rows = 0
        while self._heap:
            entry = heapq.heappop(self._heap)
            _, _, start, _, job = entry
            if job.cancelled:
                continue
            takes = job.work.rows if isinstance(job.work, SharedWork) else self._pass_rows + 1
            if jobs and (rows + takes > self._pass_rows or type(job.work) is not type(jobs[0].work)):
                left.append(entry)
                continue
            jobs.append(job)
            rows += takes
            self._now = max(self._now, start)
            if rows >= self._pass_rows:
                break
        for entry in left:
            heapq.heappush(self._heap, entry)
        self._clocks = {peer_id: each for peer_id, each in self._clocks.items() if sum(each) > self._now}
        return jobs

    def _execute(self, jobs: list[_Job]) -> None:
        started_at = trio.current_time()
        for job in jobs:
            job.started_at = started_at
        self._thread.start(partial(_run_all, [job.work for job in jobs]), partial(self._finish, jobs, started_at))
        self._idle = trio.Event()

    def _finish(
        self, jobs: list[_Job], started_at: float, passed: outcome.Outcome[tuple[list[outcome.Outcome[Any]], float]]
    ) -> None:
        """A pass has ended: tell who asked, and go on."""
        self._idle.set()
        ended_at = trio.current_time()
        self.busy_s += ended_at - started_at
        self._learn(jobs, ended_at - started_at, ended_at)
        results: list[outcome.Outcome[Any]]
        if isinstance(passed, outcome.Error):  # a fault of the pass itself is everybody's
            results, compute_s = [outcome.Error(passed.error) for _ in jobs], 0.0
        else:
            results, compute_s = passed.value
        for job, result in zip(jobs, results, strict=True):
            job.outcome, job.compute_s = result, compute_s
            job.finished.set()
        self._begin()

    def _learn(self, jobs: list[_Job], took_s: float, now: float) -> None:
        """What a pass says about the next ones."""
        self._ended_at = now
        for job in jobs:
            if job.visitor is not None:
                job.visitor.waiting = False
                job.visitor.left_at = now
                if job.priority == Priority.DECODE:
                    self._visitors.add(job.visitor)
        if all(job.priority == Priority.DECODE for job in jobs):
            self._step_s = min(took_s, _smoothed(self._step_s, took_s))
        if not all(isinstance(job.work, SharedWork) for job in jobs):
            return
        self._pass_s = _smoothed(self._pass_s, took_s)
        if all(job.priority == Priority.DECODE for job in jobs):
            self._decode_s = min(took_s, _smoothed(self._decode_s, took_s))  # one that was held up says little
        elif any(job.priority == Priority.DECODE for job in jobs) and self._decode_s:
            self._piece_rows = next_piece(self._piece_rows, took_s, self._decode_s)


def back_by(visitors: Iterable[Visitor], ended_at: float, pass_s: float) -> float:
    """Until when to wait for visitors that usually are back soon after a pass; -inf: for nobody.

    Args:
        ended_at: when the last pass ended; pass_s: how long passes take.
    """
    window = GATHER_SHARE * pass_s
    absent = (visitor for visitor in visitors if not visitor.waiting and visitor.gap_s <= window)
    latest = max((visitor.left_at + 2 * visitor.gap_s for visitor in absent), default=-math.inf)
    return min(latest, ended_at + window)


def next_piece(rows: int, mixed_s: float, decode_s: float) -> int:
    """How many rows of a prompt to put into passes with decode steps, so that these take at most twice their time, the
    slow ones among them, too.

    Args:
        rows: how many there were; mixed_s: how long such a pass took; decode_s: one without them.
    """
    if mixed_s > 1.7 * decode_s:
        return max(2, rows * 3 // 4)
    return min(64, rows * 4 // 3 + 1) if mixed_s < 1.35 * decode_s else rows


def _smoothed(old: float, new: float) -> float:
    return 0.8 * old + 0.2 * new if old else new


def _run_all(works: Sequence[Callable[[], Any]]) -> tuple[list[outcome.Outcome[Any]], float]:
    """In the compute thread; also returns the seconds it took there, without the ways into the thread and back."""
    shared = [work for work in works if isinstance(work, SharedWork)]
    began = time.perf_counter()
    outcomes = type(shared[0]).together(shared) if len(shared) > 1 else [outcome.capture(work) for work in works]
    return outcomes, time.perf_counter() - began
