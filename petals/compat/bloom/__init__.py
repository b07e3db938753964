"""`petals.bloom` of Petals 1.0."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import WRAPPED_BLOCK

__getattr__, __dir__ = moved(
    __name__,
    {
        "BloomBlock": WRAPPED_BLOCK,
        "WrappedBloomBlock": WRAPPED_BLOCK,
    },
)
