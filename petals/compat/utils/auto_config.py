"""`petals.utils.auto_config` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import Gone, moved
from petals.compat.names import AUTO_CLASSES

__getattr__, __dir__ = moved(
    __name__,
    dict.fromkeys(AUTO_CLASSES, "petals")
    | {
        "register_model_classes": Gone("register the classes with transformers: see docs/custom-model.md"),
    },
)
