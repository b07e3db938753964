"""What servers really took, by our own clock.

A record says how fast its server is; nothing proves it. So what is said orders servers only until one has answered
steps of ours: then what was measured counts, in this session and in later ones, until it is old.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from petals.protocols.types import PeerId

REMEMBER_S = 1800.0
"""How long a measurement counts; a server that was slow once may be alone or repaired by then."""
KEPT = 0.7
"""Weight of what was known against one new step."""
MAX_KNOWN = 4096


@dataclass(slots=True)
class _Known:
    block_s: float
    at: float


class Speeds:
    """Of all servers of one model that have answered steps of one token.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: dict[PeerId, _Known] = {}

    def note(self, peer_id: PeerId, blocks: int, seconds: float) -> None:
        """One token of one row took so long through so many blocks, from our sending it to the answer, without the
        way there and back where that is known."""
        block_s = max(0.0, seconds) / blocks
        known = self._known.pop(peer_id, None)
        if known is not None and self._clock() - known.at < REMEMBER_S:
            block_s = KEPT * known.block_s + (1 - KEPT) * block_s
        while len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[peer_id] = _Known(block_s, self._clock())

    def block_s(self, peer_id: PeerId) -> float | None:
        """Seconds per block; None: not measured lately."""
        known = self._known.get(peer_id)
        return known.block_s if known is not None and self._clock() - known.at < REMEMBER_S else None
