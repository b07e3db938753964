"""`petals.bloom.from_pretrained` of Petals 1.0."""

from __future__ import annotations

from petals.compat.moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "load_pretrained_block": "petals.compat.blocks",
    },
)
