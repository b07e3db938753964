"""How much one API key may ask a minute. Clock passed in; does no I/O. Answers at once: waiting.py."""

from __future__ import annotations

from collections.abc import Callable

from petals.gateway.errors import ApiError
from petals.gateway.keys import Limits


class Allowance:
    """What one key has left. A minute's requests may come at once; then they grow back one by one."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._left = float(limits.requests_per_minute or 0)
        self._counted_at = clock()

    def take_request(self) -> None:
        """Count a request.

        Raises:
            ApiError: 429, there were too many within the last minute.
        """
        per_minute = self._limits.requests_per_minute
        if per_minute is None:
            return
        now = self._clock()
        self._left = min(float(per_minute), self._left + (now - self._counted_at) * per_minute / 60)
        self._counted_at = now
        if self._left < 1:
            raise ApiError(
                429,
                f"this key may ask {per_minute} times a minute",
                code="rate_limit_exceeded",
                retry_after_s=(1 - self._left) * 60 / per_minute,
            )
        self._left -= 1

    @property
    def answers(self) -> int | None:
        """Generated at once; None: no limit of its own."""
        return self._limits.answers
