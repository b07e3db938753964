"""How fast one stranger may open streams or connections. Pure: the clock is passed in, and nobody waits here.

Everybody has a bucket of streams. What was opened for nothing stays paid for, a mistake costs `MISTAKE` streams, and a
stream that was served with real work is given back: so a busy client is not slowed down, and a stranger who keeps us
busy with nonsense soon waits before we read its next word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from petals.peer.base.token_bucket import TokenBucket

MISTAKE = 16
"""What a stream costs that broke a rule, in streams."""
MAX_KNOWN = 4096
"""Buckets remembered; beyond it the full ones go, then the oldest: who was forgotten starts with a full one."""

Who = TypeVar("Who")


class Conduct(Generic[Who]):
    """The buckets of all strangers.

    Args:
        rate: streams per second, for each.
        burst: streams at once after a rest.
        clock: seconds.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: dict[Who, TokenBucket] = {}

    def wait_s(self, who: Who) -> float:
        """For how many seconds `who` should wait before one more stream; nothing is taken."""
        bucket = self._buckets.get(who)
        return 0.0 if bucket is None else bucket.delay(1, self._clock())

    def charge(self, who: Who, streams: int = 1) -> float:
        """Take so many streams, or give them back if negative; returns for how many seconds `who` should wait."""
        now = self._clock()
        bucket = self._buckets.get(who)
        if bucket is None:
            self._make_room(now)
            bucket = self._buckets[who] = TokenBucket(self._rate, self._burst)
        return bucket.take(streams, now)

    def _make_room(self, now: float) -> None:
        if len(self._buckets) < MAX_KNOWN:
            return
        for who in [who for who, bucket in self._buckets.items() if bucket.is_full(now)]:
            del self._buckets[who]
        if len(self._buckets) >= MAX_KNOWN:
            del self._buckets[next(iter(self._buckets))]
