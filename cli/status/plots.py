"""Plots for terminals, of characters. Pure."""

from __future__ import annotations

from collections.abc import Sequence

EIGHTHS = " ▁▂▃▄▅▆▇█"


def bars(values: Sequence[float], width: int, height: int = 1) -> list[str]:
    """`height` lines of at most `width` characters, the highest value as high as there is room.

    Where there are more values than columns a bar is the highest of those it stands for, so that none is missed; where
    there are fewer a value has several columns. What is above 0 is never drawn as nothing.
    """
    if not values:
        return [""] * height
    columns = [
        max(values[first : max(first + 1, (column + 1) * len(values) // width)])
        for column in range(width)
        for first in [column * len(values) // width]
    ]
    top = max(columns)
    eighths = [max(1, round(8 * height * value / top)) if value > 0 else 0 for value in columns]
    lines = []
    for row in reversed(range(height)):
        lines.append("".join(EIGHTHS[min(8, max(0, each - 8 * row))] for each in eighths).rstrip())
    return lines


def figure(value: float) -> str:
    """Short: 8.3, 120, 4."""
    return f"{value:.1f}" if value < 10 and value != int(value) else f"{value:.0f}"
