"""Numbers on the command line: one that is out of bounds is refused before anything has been started for it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

SEEDS = (-(1 << 63), (1 << 63) - 1)
"""What torch takes."""


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type for argparse: a whole number from `low` to `high` (None: no end)."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, not {text!r}")
        return value

    return read


def number(low: float = 0, high: float | None = None, *, above: bool = False) -> Callable[[str], float]:
    """A type for argparse: a number from `low` to `high` (None: no end); `above`: not `low` itself."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = math.isfinite(value) and low <= value and (high is None or value <= high)
        if not inside or (above and value == low):
            start = f"above {low:g}" if above else f"of at least {low:g}" if high is None else f"from {low:g}"
            end = "" if high is None else f" and at most {high:g}" if above else f" to {high:g}"
            raise argparse.ArgumentTypeError(f"expected a number {start}{end}, not {text!r}")
        return value

    return read


positive = number(above=True)
"""A number above 0."""
at_least_1 = whole(1)
