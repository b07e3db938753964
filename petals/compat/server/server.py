"""`petals.server.server` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import SERVING

__getattr__, __dir__ = moved(
    __name__,
    {
        "Server": SERVING,
        "ModuleContainer": SERVING,
    },
)
