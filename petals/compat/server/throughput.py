"""`petals.server.throughput` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import BENCH

__getattr__, __dir__ = moved(
    __name__,
    {
        "get_server_throughput": BENCH,
        "measure_compute_rps": BENCH,
    },
)
