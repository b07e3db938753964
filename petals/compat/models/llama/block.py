"""`petals.models.llama.block` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import WRAPPED_BLOCK

__getattr__, __dir__ = moved(
    __name__,
    {
        "WrappedLlamaBlock": WRAPPED_BLOCK,
    },
)
