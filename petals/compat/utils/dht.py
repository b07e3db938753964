"""`petals.utils.dht` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import ANNOUNCED

__getattr__, __dir__ = moved(
    __name__,
    {
        "get_remote_module_infos": "petals.compat.directory",
        "declare_active_modules": ANNOUNCED,
    },
)
