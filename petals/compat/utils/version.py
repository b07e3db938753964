"""`petals.utils.version` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import Gone, moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "get_compatible_model_repo": "petals.compat.names",
        "validate_version": Gone("no version is asked for on the network"),
    },
)
