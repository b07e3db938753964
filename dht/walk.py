"""Kademlia's iterative search, without a network: who is nearest to a key, asked in parallel, waiting for nobody.

Theory. The search knows a growing set of peers, nearest first. It asks the nearest ones it has not asked; each names
peers nearer still; it ends when the `want` nearest have answered. A peer that fails drops out of that front. One that
is *late* drops out too but may come back with its answer: so frozen peers cost `patience_s` about once, however many
there are, since they become late together - and the search as a whole never takes longer than `total_s`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import Generic, TypeVar

import trio

P = TypeVar("P", bound=Hashable)

ALPHA = 8
"""Questions under way at once, late ones not counted."""
MAX_KNOWN = 1000
"""Peers one search keeps in mind, the nearest ones; liars can name any number."""


class _State(enum.Enum):
    NEW = enum.auto()
    ASKED = enum.auto()
    LATE = enum.auto()
    ANSWERED = enum.auto()
    FAILED = enum.auto()


async def walk(
    seeds: Iterable[P],
    distance: Callable[[P], int],
    ask: Callable[[P], Awaitable[Iterable[P] | None]],
    *,
    want: int,
    patience_s: float,
    total_s: float,
    alpha: int = ALPHA,
) -> list[P]:
    """The `want` peers nearest to a key that answer, nearest first; fewer if there are no more. Bounded by `total_s`.

    Args:
        distance: of a peer to the key.
        ask: asks one peer for peers nearer to the key; None: it failed. Must not raise. Is cancelled at the end.
        patience_s: who takes longer is not waited for as long as others answer. Grows to twice the slowest answer, so
            that a slow link is not taken for frozen peers.
    """
    search = _Search(distance, want, patience_s)
    search.learn(seeds)

    async def one(peer: P) -> None:
        found = await ask(peer)
        search.answered(peer, found, trio.current_time())

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(total_s):
            while not search.is_over():
                now = trio.current_time()
                for peer in search.to_ask(alpha):
                    search.asked(peer, now)
                    nursery.start_soon(one, peer)
                woken = search.woken = trio.Event()
                with trio.CancelScope(deadline=search.next_deadline()):
                    await woken.wait()
                search.mark_late(trio.current_time())
        nursery.cancel_scope.cancel()
    return search.result()


class _Search(Generic[P]):
    """What is known so far; decides, and does not wait."""

    def __init__(self, distance: Callable[[P], int], want: int, patience_s: float) -> None:
        self.woken = trio.Event()
        self._distance = distance
        self._want = want
        self._patience_s = patience_s
        self._asked_at: dict[P, float] = {}
        self._state: dict[P, _State] = {}
        self._nearest: list[tuple[int, P]] = []
        self._late_at: dict[P, float] = {}

    def learn(self, peers: Iterable[P]) -> None:
        for peer in peers:
            if peer not in self._state:
                self._state[peer] = _State.NEW
                self._nearest.append((self._distance(peer), peer))
        self._nearest.sort(key=lambda pair: pair[0])
        for _, peer in self._nearest[MAX_KNOWN:]:
            if self._state[peer] is _State.NEW:
                del self._state[peer]
        self._nearest = [pair for pair in self._nearest if pair[1] in self._state]

    def asked(self, peer: P, now: float) -> None:
        self._state[peer] = _State.ASKED
        self._asked_at[peer] = now
        self._late_at[peer] = now + self._patience_s

    def answered(self, peer: P, found: Iterable[P] | None, now: float) -> None:
        self._state[peer] = _State.FAILED if found is None else _State.ANSWERED
        if found is not None:
            self._patience_s = max(self._patience_s, 2 * (now - self._asked_at[peer]))
        self._late_at.pop(peer, None)
        self.learn(found or ())
        self.woken.set()

    def mark_late(self, now: float) -> None:
        for peer, late_at in list(self._late_at.items()):
            if late_at <= now:
                del self._late_at[peer]
                self._state[peer] = _State.LATE

    def next_deadline(self) -> float:
        return min(self._late_at.values(), default=math.inf)

    def to_ask(self, alpha: int) -> list[P]:
        fresh = [peer for peer in self._front() if self._state[peer] is _State.NEW]
        return fresh[: max(0, alpha - len(self._late_at))]

    def is_over(self) -> bool:
        front = self._front()
        if not front:  # nobody has answered: then the late ones are worth waiting for
            return _State.LATE not in self._state.values()
        return all(self._state[peer] is _State.ANSWERED for peer in front)

    def result(self) -> list[P]:
        return [p for _, p in self._nearest if self._state[p] is _State.ANSWERED][: self._want]

    def _front(self) -> list[P]:
        alive = (_State.NEW, _State.ASKED, _State.ANSWERED)
        return [peer for _, peer in self._nearest if self._state[peer] in alive][: self._want]
