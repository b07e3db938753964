"""`petals.server.block_selection` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import PLACEMENT

__getattr__, __dir__ = moved(
    __name__,
    {
        "choose_best_blocks": PLACEMENT,
        "should_choose_other_blocks": PLACEMENT,
    },
)
