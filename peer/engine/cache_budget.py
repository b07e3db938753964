"""The cache budget: bytes are leased before a session's first step and come back on every way out."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from petals.protocols.errors import SwarmError
from petals.protocols.types import PeerId


class NoRoom(SwarmError):
    """The budget can not give that much.

    Attributes:
        for_ever: it is more than a session may have, however long one waits.
    """

    def __init__(self, message: str, *, for_ever: bool) -> None:
        self.for_ever = for_ever
        super().__init__(message)


@dataclass(eq=False)
class _Waiting:
    nbytes: int
    granted: trio.Event = field(default_factory=trio.Event)


class CacheBudget:
    """A fixed number of bytes, leased first come, first served.

    What nobody leases may be filled with what is worth keeping; that gives way to any lease.

    Args:
        total_bytes: all there is.
        max_share: the most one remote peer may hold or wait for, as a share of the total.
        leasable_bytes: what the machine has left for a new lease; the budget's own bytes are not touched in advance.
        what: how refusals call the bytes.

    Attributes:
        kept_bytes: filled with what is kept.
        make_room: give up at least so many of the kept bytes, by `forget`.
    """

    def __init__(
        self,
        total_bytes: int,
        *,
        max_share: float = 1.0,
        leasable_bytes: Callable[[], float] = lambda: math.inf,
        what: str = "cache",
    ) -> None:
        self._what = what
        self.total_bytes = total_bytes
        self.kept_bytes = 0
        self.make_room: Callable[[int], None] | None = None
        self._leasable_bytes = leasable_bytes
        self._free_bytes = total_bytes
        self._max_peer_bytes = int(total_bytes * max_share)
        self._by_peer: Counter[PeerId] = Counter()
        self._queue: deque[_Waiting] = deque()

    @property
    def max_peer_bytes(self) -> int:
        """The most that one peer may hold."""
        return self._max_peer_bytes

    @property
    def left_bytes(self) -> int:
        """What can be leased now: what is kept gives way."""
        return self._free_bytes + self.kept_bytes

    @property
    def waiting(self) -> int:
        """How many requests are queued."""
        return len(self._queue)

    async def acquire(self, peer_id: PeerId, nbytes: int, wait_s: float) -> Lease:
        """Lease `nbytes` for `peer_id`, queueing for at most `wait_s` seconds behind those who came before.

        Raises:
            NoRoom: more than a peer may hold, or no room within `wait_s`. Nothing is held then.
        """
        if nbytes > self._max_peer_bytes:
            raise NoRoom(
                f"{nbytes} bytes of {self._what} asked, one peer may hold {self._max_peer_bytes}", for_ever=True
            )
        if self._by_peer[peer_id] + nbytes > self._max_peer_bytes:
            raise NoRoom(f"this peer would hold more than {self._max_peer_bytes} bytes of {self._what}", for_ever=False)
        if nbytes > (leasable := self._leasable_bytes()):
            raise NoRoom(
                f"{nbytes} bytes of {self._what} asked; other programs have taken this machine's memory, of which "
                f"{max(0, int(leasable))} bytes are left",
                for_ever=False,
            )
        self._by_peer[peer_id] += nbytes
        entry = _Waiting(nbytes)
        self._queue.append(entry)
        self._hand_out()
        try:
            if not entry.granted.is_set():
                with trio.move_on_after(max(wait_s, 0)):
                    await entry.granted.wait()
            if not entry.granted.is_set():
                raise NoRoom(f"no room for {nbytes} bytes of {self._what} within {wait_s:.1f} s", for_ever=False)
        except BaseException:
            self._by_peer[peer_id] -= nbytes
            if entry.granted.is_set():  # granted and cancelled in the same moment
                self._free_bytes += nbytes
            else:
                self._queue.remove(entry)
            self._hand_out()  # a big request that gives up may have held smaller ones back
            raise
        return Lease(self, peer_id, nbytes)

    def _hand_out(self) -> None:
        while self._queue and self._queue[0].nbytes <= self.left_bytes:
            entry = self._queue.popleft()
            if entry.nbytes > self._free_bytes and self.make_room is not None:
                self.make_room(entry.nbytes - self._free_bytes)
            self._free_bytes -= entry.nbytes
            entry.granted.set()

    def keep(self, lease: Lease, nbytes: int) -> None:
        """Bytes of a lease become kept ones; the rest stays leased."""
        assert nbytes <= lease.nbytes
        lease.nbytes -= nbytes
        self._by_peer[lease.peer_id] -= nbytes
        self.kept_bytes += nbytes
        self._hand_out()

    def forget(self, nbytes: int) -> None:
        """Kept bytes are free again."""
        self.kept_bytes -= nbytes
        self._free_bytes += nbytes

    def _release(self, lease: Lease) -> None:
        self._by_peer[lease.peer_id] -= lease.nbytes
        self._by_peer += Counter()  # drops peers that hold nothing
        self._free_bytes += lease.nbytes
        self._hand_out()


@dataclass(eq=False)
class Lease:
    """Bytes that are ours until `release()`, which may be called twice. A context manager."""

    budget: CacheBudget
    peer_id: PeerId
    nbytes: int
    _released: bool = False

    def release(self) -> None:
        if not self._released:
            self._released = True
            self.budget._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
