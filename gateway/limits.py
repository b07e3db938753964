"""How much one API key may ask: requests per minute and answers at once. Clock passed in; does no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from petals.gateway.errors import ApiError
from petals.gateway.keys import Limits


class Allowance:
    """What one key has left. A minute's requests may come at once; then they grow back one by one."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._left = float(limits.requests_per_minute or 0)
        self._counted_at = clock()
        self._answering = 0

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

    @contextmanager
    def answering(self, count: int) -> Iterator[None]:
        """Hold room for `count` answers while the context is open.

        Raises:
            ApiError: 429, the key's others are still being generated.
        """
        allowed = self._limits.answers
        if allowed is not None and self._answering + count > allowed:
            raise ApiError(
                429,
                f"this key may have {allowed} answers generated at once, and has {self._answering}",
                code="rate_limit_exceeded",
                retry_after_s=1.0,
            )
        self._answering += count
        try:
            yield
        finally:
            self._answering -= count
