"""What ended sessions leave behind, for the next one that begins with the same tokens.

A chat sends the whole conversation again with every question. Its keys and values are kept for a while where no lease
needs the room, under the names that the client gives them (protocols/prefixes.py), and only for the client that left
them, unless the operator says that all clients trust each other: names are believed, so that a client could leave
nonsense under the name of somebody else's prompt.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from petals.models.blocks.cache import SpanCache
from petals.peer.engine.cache_budget import CacheBudget, Lease
from petals.protocols.prefixes import PREFIX_TOKENS
from petals.protocols.types import PeerId


@dataclass(frozen=True, slots=True)
class Owner:
    """Who may find it, and for what it is good."""

    peer_id: PeerId
    """Empty: everybody."""
    blocks: range
    adapter: str


@dataclass(eq=False)
class _Kept:
    owner: Owner
    cache: SpanCache
    names: tuple[bytes, ...]
    left_by: PeerId
    used_at: float


class PrefixStore:
    """Caches by name, in the room that a budget has to spare.

    Args:
        idle_s: how long one is kept that nobody asks for.
        shared: everybody may find what anybody left.
    """

    def __init__(self, budget: CacheBudget, *, idle_s: float, shared: bool) -> None:
        self.hits = 0
        """Sessions that began with kept tokens."""
        self._budget = budget
        self._idle_s = idle_s
        self._shared = shared
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        """By identity, the longest unused first."""
        self._names: dict[tuple[Owner, bytes], _Kept] = {}
        budget.make_room = self._make_room

    def owner(self, peer_id: PeerId, blocks: range, adapter: str) -> Owner:
        return Owner(PeerId("") if self._shared else peer_id, blocks, adapter)

    def find(self, owner: Owner, names: Sequence[bytes], max_tokens: int) -> tuple[SpanCache, int] | None:
        """The kept cache that holds most of a sequence, and how many of its tokens."""
        for count in range(min(len(names), max_tokens // PREFIX_TOKENS), 0, -1):
            kept = self._names.get((owner, names[count - 1]))
            if kept is not None:
                kept.used_at = trio.current_time()
                self._kept.move_to_end(id(kept))
                self.hits += 1
                return kept.cache, count * PREFIX_TOKENS
        return None

    def add(self, owner: Owner, cache: SpanCache, names: Sequence[bytes], lease: Lease) -> None:
        """Keep a cache of exactly the named tokens; its bytes come out of the session's lease."""
        kept = _Kept(owner, cache, tuple(names), lease.peer_id, trio.current_time())
        replaced = {self._names.get((owner, name)) for name in names} - {None}
        for name in names:
            self._names[owner, name] = kept
        self._kept[id(kept)] = kept
        self._budget.keep(lease, cache.nbytes)
        for old in replaced:
            if old is not None and not any(self._names.get((old.owner, name)) is old for name in old.names):
                self._drop(old)

    async def run(self) -> None:
        """Forget what nobody has asked for in a while; until cancelled."""
        while True:
            await trio.sleep(self._idle_s / 4)
            now = trio.current_time()
            for kept in list(self._kept.values()):
                if now - kept.used_at > self._idle_s:
                    self._drop(kept)

    def _make_room(self, nbytes: int) -> None:
        """Whoever has left most loses what it has not used for longest."""
        until = self._budget.kept_bytes - nbytes
        while self._budget.kept_bytes > until and self._kept:
            left = Counter[PeerId]()
            for kept in self._kept.values():
                left[kept.left_by] += kept.cache.nbytes
            greediest = max(left, key=lambda peer_id: left[peer_id])
            self._drop(next(kept for kept in self._kept.values() if kept.left_by == greediest))

    def _drop(self, kept: _Kept) -> None:
        del self._kept[id(kept)]
        for name in kept.names:
            if self._names.get((kept.owner, name)) is kept:
                del self._names[kept.owner, name]
        self._budget.forget(kept.cache.nbytes)
