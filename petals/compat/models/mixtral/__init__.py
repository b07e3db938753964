"""`petals.models.mixtral` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import WRAPPED_BLOCK, family_classes

__getattr__, __dir__ = moved(
    __name__,
    dict.fromkeys(family_classes("Mixtral"), "petals")
    | {
        "WrappedMixtralBlock": WRAPPED_BLOCK,
    },
)
