"""A histogram as Prometheus reads it. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

# The bounds of vLLM's boards, so that a board made for it reads the same here.
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Histogram:
    """Counts of seconds up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def samples(self, labels: str) -> Iterator[tuple[str, float]]:
        """What stands behind the name, and its value.

        Args:
            labels: without braces.
        """
        total = 0
        comma = "," if labels else ""
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            total += count
            yield f'_bucket{{{labels}{comma}le="{"+Inf" if bound is None else f"{float(bound)}"}"}}', total
        braced = f"{{{labels}}}" if labels else ""
        yield f"_sum{braced}", self._sum
        yield f"_count{braced}", total
