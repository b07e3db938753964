"""Second servers that are told the same as the first ones, a little later: a failure costs a round trip, no replay.

A task of its own feeds each hop's shadow with what the hop has been told, off the critical path. When a hop fails, its
shadow is told the few steps it lacks and takes the place. It costs a second lease, and a second time the compute.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from petals.peer.base.concurrency import gather
from petals.peer.client.hops.hop import Hop
from petals.protocols.errors import SwarmError
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""After this long a hop without a shadow looks for one again."""


@dataclass(eq=False)
class _Shadow:
    """The second server of one hop."""

    of: Hop
    hop: Hop | None = None
    stale: bool = False
    """Rolled back while it was being fed, or with rows in another order: begin again."""
    next_try: float = -math.inf
    lock: trio.Lock = field(default_factory=trio.Lock)

    async def feed(self, open_hop: Callable[[Hop], Awaitable[Hop]]) -> None:
        """Bring the shadow to where its hop is. An error costs the shadow."""
        async with self.lock:
            try:
                if self.stale:
                    await self.drop()
                if self.hop is None:
                    if trio.current_time() < self.next_try:
                        return
                    self.next_try = trio.current_time() + RETRY_S
                    self.hop = await open_hop(self.of)
                    self.stale = False
                if missing := self.of.history[len(self.hop.history) :]:
                    await self.hop.replay(missing, want_outputs=False)
            except SwarmError as error:
                log.info("no standby for blocks %d:%d: %s", self.of.blocks.start, self.of.blocks.stop, error)
                await self.drop()

    async def drop(self) -> None:
        """Give the lease back."""
        hop, self.hop, self.stale = self.hop, None, False
        if hop is not None:
            await hop.reset()


class Standbys:
    """The shadows of one session's hops. `run` must be running.

    Args:
        hops: the session's hops as they are now.
        open_hop: (hop, peers to avoid) -> a session at another server of the same blocks, or a SwarmError.
    """

    def __init__(
        self, hops: Callable[[], list[Hop]], open_hop: Callable[[Hop, frozenset[PeerId]], Awaitable[Hop]]
    ) -> None:
        self._hops = hops
        self._open_hop = open_hop
        self._shadows: dict[int, _Shadow] = {}
        self._told = trio.Event()
        self._scope = trio.CancelScope()

    @property
    def ready(self) -> bool:
        """Whether every hop has a shadow that lacks nothing."""
        shadows = [self._shadows.get(id(hop)) for hop in self._hops()]
        return all(
            shadow is not None
            and shadow.hop is not None
            and not shadow.stale
            and len(shadow.hop.history) == len(shadow.of.history)
            for shadow in shadows
        )

    def tell(self) -> None:
        """Something has been added to the hops' histories."""
        self._told.set()

    async def run(self) -> None:
        """Feed until closed."""
        with self._scope:
            try:
                while True:
                    self._told = trio.Event()
                    hops = self._hops()
                    for hop in hops:
                        self._shadows.setdefault(id(hop), _Shadow(hop))
                    shadows = [self._shadows[id(hop)] for hop in hops]
                    async with trio.open_nursery() as nursery:
                        for shadow in shadows:
                            nursery.start_soon(shadow.feed, self._open)
                    with trio.move_on_after(RETRY_S):
                        await self._told.wait()
            finally:
                with trio.CancelScope(shield=True):  # each goodbye is bounded by itself
                    await gather([shadow.drop for shadow in self._shadows.values()])

    def rollback(self, position: int) -> None:
        """Shadows that can follow do, the others begin again."""
        for shadow in self._shadows.values():
            if shadow.hop is None or shadow.lock.locked():
                shadow.stale = True
            elif shadow.hop.truncate(position) is not None:
                shadow.stale = True  # its rows were reordered by steps that are forgotten now

    async def take(self, lost: Hop) -> Hop | None:
        """The shadow of a hop that has failed, told all that the hop was told; None: there is none.

        Raises:
            RemoteError: it failed too.
        """
        shadow = self._shadows.pop(id(lost), None)
        if shadow is None:
            return None
        async with shadow.lock:
            hop, shadow.hop = shadow.hop, None
            if hop is None:
                return None
            if shadow.stale:
                await hop.reset()
                return None
            try:
                if missing := lost.history[len(hop.history) :]:
                    await hop.replay(missing, want_outputs=False)
            except BaseException:
                await hop.reset()
                raise
            return hop

    async def forget(self, hop: Hop) -> None:
        """The shadow of a hop that is no more."""
        shadow = self._shadows.pop(id(hop), None)
        if shadow is not None:
            async with shadow.lock:
                await shadow.drop()

    def close(self) -> None:
        """End `run`, which gives all leases back."""
        self._scope.cancel()

    async def _open(self, hop: Hop) -> Hop:
        taken = {each.peer_id for each in self._hops()}
        return await self._open_hop(hop, frozenset(taken))
