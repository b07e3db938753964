"""`petals.utils.ping` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import STATUS

__getattr__, __dir__ = moved(
    __name__,
    {
        "ping": STATUS,
        "PingAggregator": STATUS,
    },
)
