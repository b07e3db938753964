"""How fast one peer may ask: a bucket of tokens and one of bytes for each, refilled at a steady rate.

A request is paid for before it is served. Who has not enough waits for its turn: the bucket is overdrawn, so that the
next request of the same peer queues behind this one, whichever session it is of. Where the wait would be longer than a
client waits for an answer, nothing is taken and the peer is told when to come back. Answers are paid for afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from petals.protocols.types import PeerId

BURST_S = 5.0
"""What a peer that was away may ask at once, in seconds of its rate."""
MAX_PEERS = 4096
"""Peers remembered; beyond it those who have all their burst again are forgotten."""


@dataclass
class Bucket:
    """Fills at `rate` per second up to `BURST_S` seconds' worth; may be overdrawn."""

    rate: float
    level: float
    filled_at: float

    @classmethod
    def full(cls, rate: float, now: float) -> Bucket:
        return cls(rate, rate * BURST_S, now)

    def fill(self, now: float) -> None:
        self.level = min(self.rate * BURST_S, self.level + self.rate * (now - self.filled_at))
        self.filled_at = now

    def wait_s(self, cost: float) -> float:
        """How long until `cost` is there; as of the last `fill`."""
        return max(0.0, (cost - self.level) / self.rate)


@dataclass(frozen=True, slots=True)
class Turn:
    """What a peer is told: `wait_s` seconds until its turn, which is booked; or, `refused`, until it may ask again (0:
    it asks for more than it will ever get at once)."""

    wait_s: float
    refused: bool = False


class Rates:
    """The buckets of all peers. Does no waiting of its own.

    Args:
        tokens_s, bytes_s: for each peer; None: as many as it likes.
        free: peers without a rate.
        clock: seconds.
    """

    def __init__(
        self, tokens_s: float | None, bytes_s: float | None, free: frozenset[PeerId], clock: Callable[[], float]
    ) -> None:
        self._rates = (tokens_s, bytes_s)
        self._free, self._clock = free, clock
        self._buckets: dict[PeerId, tuple[Bucket | None, Bucket | None]] = {}

    def take(self, peer_id: PeerId, *, tokens: int = 0, nbytes: int = 0, patience_s: float) -> Turn:
        """Book a request, unless its turn would come later than `patience_s` from now."""
        pairs = self._paired(peer_id, tokens, nbytes)
        wait_s = max((bucket.wait_s(cost) for bucket, cost in pairs), default=0.0)
        if any(cost > bucket.rate * (BURST_S + patience_s) for bucket, cost in pairs):
            return Turn(0.0, refused=True)
        if wait_s > patience_s:
            return Turn(wait_s - patience_s, refused=True)
        for bucket, cost in pairs:
            bucket.level -= cost
        return Turn(wait_s)

    def charge(self, peer_id: PeerId, *, tokens: int = 0, nbytes: int = 0) -> None:
        """Take what was used already; a negative amount gives back what was not."""
        for bucket, cost in self._paired(peer_id, tokens, nbytes):
            bucket.level -= cost

    def _paired(self, peer_id: PeerId, tokens: int, nbytes: int) -> list[tuple[Bucket, int]]:
        if peer_id in self._free or self._rates == (None, None):
            return []
        now = self._clock()
        buckets = self._buckets.get(peer_id)
        if buckets is None:
            if len(self._buckets) >= MAX_PEERS:
                self._forget_the_full(now)
            tokens_s, bytes_s = (None if rate is None else Bucket.full(rate, now) for rate in self._rates)
            buckets = self._buckets[peer_id] = (tokens_s, bytes_s)
        pairs = [(bucket, cost) for bucket, cost in zip(buckets, (tokens, nbytes), strict=True) if bucket is not None]
        for bucket, _ in pairs:
            bucket.fill(now)
        return [(bucket, cost) for bucket, cost in pairs if cost]

    def _forget_the_full(self, now: float) -> None:
        for peer_id, buckets in list(self._buckets.items()):
            known = [bucket for bucket in buckets if bucket is not None]
            for bucket in known:
                bucket.fill(now)
            if all(bucket.level >= bucket.rate * BURST_S for bucket in known):
                del self._buckets[peer_id]
