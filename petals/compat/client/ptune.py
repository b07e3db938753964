"""`petals.client.ptune` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import TUNING

__getattr__, __dir__ = moved(
    __name__,
    {
        "PTuneConfig": TUNING,
        "PTuneMixin": TUNING,
    },
)
