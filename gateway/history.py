"""Throughput over time, for the swarm page: counters read at a steady pace into a ring that forgets. Does no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

PERIOD_S = 5.0
SAMPLES = 360
"""Half an hour."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters that only grow, and gauges, as of one moment."""

    prompt_tokens: int
    generated_tokens: int
    answers: int
    """Being generated."""
    sessions: int
    """Open at this peer's server half."""


class History:
    """The last `SAMPLES` readings as rates."""

    def __init__(self, read: Callable[[], Reading], clock: Callable[[], float] = trio.current_time) -> None:
        self._read = read
        self._clock = clock
        self._samples: deque[dict[str, float]] = deque(maxlen=SAMPLES)
        self._last = read()
        self._last_at = clock()

    def take(self) -> None:
        """Add what happened since the last time."""
        now, reading = self._clock(), self._read()
        passed_s = now - self._last_at
        if passed_s <= 0:
            return
        generated = reading.generated_tokens - self._last.generated_tokens
        asked = reading.prompt_tokens - self._last.prompt_tokens
        self._samples.append(
            {
                "generated_per_s": round(generated / passed_s, 3),
                "prompt_per_s": round(asked / passed_s, 3),
                "answers": reading.answers,
                "sessions": reading.sessions,
            }
        )
        self._last, self._last_at = reading, now

    def as_json(self) -> dict[str, Any]:
        """Oldest first; the last one is at most a period old."""
        return {"period_s": PERIOD_S, "room": SAMPLES, "samples": list(self._samples)}

    async def run(self) -> None:
        """Take a sample every period until cancelled."""
        while True:
            await trio.sleep(PERIOD_S)
            self.take()
