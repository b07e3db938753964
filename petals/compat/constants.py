"""`petals.constants` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "PUBLIC_INITIAL_PEERS": "petals.compat.names",
        "DTYPE_MAP": "petals.compat.data",
    },
)
