"""A token bucket: so much a second on average, a burst at first. Pure; whoever asks brings the time."""

from __future__ import annotations


class TokenBucket:
    """Says how long to wait before sending, so that no second sees more than its share.

    Args:
        rate: bytes (or whatever is counted) per second.
        burst: how many may go at once after a rest.
    """

    def __init__(self, rate: float, burst: float) -> None:
        if rate <= 0 or burst <= 0:
            raise ValueError("rate and burst must be positive")
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._filled_at = 0.0

    def delay(self, nbytes: int, now: float) -> float:
        """Seconds that whoever takes `nbytes` now has to wait before they may go. Nothing is taken."""
        return max(0.0, (nbytes - self._level_at(now)) / self._rate)

    def take(self, nbytes: int, now: float) -> float:
        """Take `nbytes`, first come, first served; returns the `delay`."""
        delay = self.delay(nbytes, now)
        self._level = self._level_at(now) - nbytes
        self._filled_at = now
        return delay

    def is_full(self, now: float) -> bool:
        """Whether all of the burst is there."""
        return self._level_at(now) >= self._burst

    def _level_at(self, now: float) -> float:
        """Below zero: promised already."""
        return min(self._burst, self._level + (now - self._filled_at) * self._rate)
