"""Who is answered next: a bounded queue, fair among keys, and among the connections of a key. Does no I/O."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from petals.gateway.errors import ApiError


@dataclass(eq=False, slots=True)
class _Ticket:
    count: int
    key: Hashable
    limit: int | None
    admitted: trio.Event = field(default_factory=trio.Event)


class WaitingLine:
    """Admits as many answers as may run at once. The others wait: keys take turns, so do the connections of a key, and
    requests of one connection come in their order. A request for many answers is not passed by smaller ones forever:
    whoever is next waits at the front until there is room."""

    def __init__(self, capacity: int, max_waiting: int, wait_s: float) -> None:
        """
        Args:
            wait_s: how long a request may wait.
        """
        self.running = 0
        """Answers."""
        self.waiting = 0
        """Requests."""
        self.on_wait: Callable[[float], None] = lambda seconds: None
        """Called with how long a request waited, when it is admitted."""
        self._capacity = capacity
        self._max_waiting = max_waiting
        self._wait_s = wait_s
        self._of_key: dict[Hashable, int] = {}
        self._line: OrderedDict[Hashable, OrderedDict[Hashable, deque[_Ticket]]] = OrderedDict()

    @asynccontextmanager
    async def admitted(
        self, count: int, *, key: Hashable = None, connection: Hashable = None, limit: int | None = None
    ) -> AsyncIterator[None]:
        """Room for `count` answers while the context is open; waits for it. Being cancelled leaves the line.

        Args:
            limit: answers of this key at once.
        Raises:
            ApiError: 400, it could never be; 429, too many wait, or it waited too long.
        """
        most = self._capacity if limit is None else min(limit, self._capacity)
        if count > most:
            whose = "this peer generates" if most == self._capacity else "this key may have"
            raise ApiError(400, f"{count} answers were asked for; {whose} at most {most} at once", param="n")
        ticket = _Ticket(count, key, limit)
        since = trio.current_time()
        self._line.setdefault(key, OrderedDict()).setdefault(connection, deque()).append(ticket)
        self.waiting += 1
        try:
            self._admit()
            if not ticket.admitted.is_set() and self.waiting > self._max_waiting:
                raise self._refused(f"{self._max_waiting} requests wait already")
            with trio.move_on_after(self._wait_s):
                await ticket.admitted.wait()
        finally:
            if not ticket.admitted.is_set():
                self._leave(ticket, connection)
                self._admit()
        if not ticket.admitted.is_set():
            raise self._refused(f"the request waited {self._wait_s:g} s for its turn")
        try:
            self.on_wait(trio.current_time() - since)
            yield
        finally:
            self.running -= count
            self._of_key[key] -= count
            if not self._of_key[key]:
                del self._of_key[key]
            self._admit()

    def _admit(self) -> None:
        """Everybody whose turn it is and for whom there is room."""
        skipped = 0
        while skipped < len(self._line):
            key, connections = next(iter(self._line.items()))
            connection, tickets = next(iter(connections.items()))
            ticket = tickets[0]
            held = self._of_key.get(key, 0)
            if ticket.limit is not None and held + ticket.count > ticket.limit:
                self._line.move_to_end(key)  # this key has what it may have; others go on
                skipped += 1
                continue
            if self.running + ticket.count > self._capacity:
                return
            skipped = 0
            self.running += ticket.count
            self._of_key[key] = held + ticket.count
            self._leave(ticket, connection)
            if key in self._line:
                self._line.move_to_end(key)
                if connection in connections:
                    connections.move_to_end(connection)
            ticket.admitted.set()

    def _leave(self, ticket: _Ticket, connection: Hashable) -> None:
        connections = self._line[ticket.key]
        connections[connection].remove(ticket)
        self.waiting -= 1
        if not connections[connection]:
            del connections[connection]
        if not connections:
            del self._line[ticket.key]

    def _refused(self, why: str) -> ApiError:
        return ApiError(
            429,
            f"{why}; this peer generates {self.running} of at most {self._capacity} answers; ask again later",
            code="rate_limit_exceeded",
            retry_after_s=min(self._wait_s, 5.0),
        )
