"""`petals.utils` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import ANNOUNCED, AUTO_CLASSES

__getattr__, __dir__ = moved(
    __name__,
    dict.fromkeys(AUTO_CLASSES, "petals")
    | {
        "get_remote_module_infos": "petals.compat.directory",
        "declare_active_modules": ANNOUNCED,
    },
)
