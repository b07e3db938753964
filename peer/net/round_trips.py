"""Round trips to other peers, measured over the live connections and kept fresh; both halves of a peer use them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import trio

from petals.peer.base.concurrency import gather
from petals.peer.net.host import Host
from petals.protocols.errors import PeerUnreachable
from petals.protocols.types import PeerId

FRESH_S = 60.0
"""How long a measurement is good for."""
PING_S = 2.0
MAX_AT_ONCE = 64
"""Peers pinged by one refresh; the others have their turn with the next."""
SMOOTHING = 0.5
"""Weight of the newest measurement."""


class RoundTrips:
    """Smoothed round trips to peers that somebody is interested in."""

    def __init__(self, host: Host, clock: Callable[[], float] = trio.current_time) -> None:
        self._host = host
        self._clock = clock
        self._seconds: dict[PeerId, float] = {}
        self._measured_at: dict[PeerId, float] = {}

    @property
    def seconds(self) -> Mapping[PeerId, float]:
        """Those measured so far."""
        return self._seconds

    async def refresh(self, peers: Iterable[PeerId]) -> None:
        """Ping those of `peers` that are new or due, all at once, and forget everybody else; bounded by `PING_S`.

        Who does not answer counts as never measured.
        """
        wanted = [peer_id for peer_id in peers if peer_id != self._host.peer_id]
        for gone in self._seconds.keys() - set(wanted):
            self._forget(gone)
        now = self._clock()
        due = [peer_id for peer_id in wanted if now >= self._measured_at.get(peer_id, -FRESH_S) + FRESH_S]
        due = sorted(due, key=lambda peer_id: self._measured_at.get(peer_id, 0.0))[:MAX_AT_ONCE]
        for peer_id, measured in zip(due, await gather([_Ping(self._host, each) for each in due]), strict=True):
            if isinstance(measured, float):
                before = self._seconds.get(peer_id, measured)
                self._seconds[peer_id] = before + SMOOTHING * (measured - before)
                self._measured_at[peer_id] = self._clock()
            else:
                self._forget(peer_id)

    def _forget(self, peer_id: PeerId) -> None:
        self._seconds.pop(peer_id, None)
        self._measured_at.pop(peer_id, None)


@dataclass(frozen=True, slots=True)
class _Ping:
    host: Host
    peer_id: PeerId

    async def __call__(self) -> float:
        with trio.move_on_after(PING_S):
            return await self.host.ping(self.peer_id)
        raise PeerUnreachable("no pong", self.peer_id)
