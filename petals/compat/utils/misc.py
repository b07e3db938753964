"""`petals.utils.misc` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import NO_DUMMY

__getattr__, __dir__ = moved(
    __name__,
    {
        "DUMMY": NO_DUMMY,
        "is_dummy": NO_DUMMY,
    },
)
