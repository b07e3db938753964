"""How a model's swarm is, in a word: who could leave before nobody can ask any more. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from petals.dht.records import ServerRecord, ServerState
from petals.protocols.types import ModelId


def copies_of(records: Iterable[ServerRecord], num_blocks: int) -> list[int]:
    """How many servers answer for each block."""
    held = [record.blocks for record in records if record.state is ServerState.ONLINE]
    return [sum(block in blocks for blocks in held) for block in range(num_blocks)]


def weakest_stretch(copies: Sequence[int]) -> range:
    """The first stretch of blocks with the fewest copies."""
    least = min(copies)
    start = copies.index(least)
    stop = start
    while stop < len(copies) and copies[stop] == least:
        stop += 1
    return range(start, stop)


def health(copies: Sequence[int]) -> tuple[str, str]:
    """ "healthy", "degraded" or "broken", and why."""
    weakest = weakest_stretch(copies)
    where = f"blocks {weakest.start}:{weakest.stop}"
    if len(weakest) == len(copies):
        where = "all blocks"
    match copies[weakest.start]:
        case 0:
            return "broken", f"nobody holds {where}"
        case 1:
            return "degraded", f"there is only one copy of {where}; when a holder leaves, nobody can ask"
        case n:
            return "healthy", f"every block is held by {n} peers or more"


def describe(model: ModelId, copies: Sequence[int]) -> dict[str, Any]:
    """The model and its health, for machines."""
    weakest = weakest_stretch(copies)
    state, words = health(copies)
    return {
        "model": model.name,
        "digest": model.digest,
        "num_blocks": len(copies),
        "health": state,
        "words": words,
        "copies": list(copies),
        "weakest": [weakest.start, weakest.stop],
    }
