"""Where pushed inputs wait for their step.

A push is believed only if the client has announced it: the session, the step and the sender. It may overtake the
client's announcement, so a few are kept for a while, and dropped when they turn out to be somebody else's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import trio

from petals.peer.engine.cache_budget import Lease
from petals.protocols import messages_pb2 as pb
from petals.protocols.types import PeerId

MAX_EARLY = 2
"""Pushes of one session kept before the step that waits for them is announced."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """One push as it came."""

    sender: PeerId
    push: pb.Push
    payload: bytearray
    lease: Lease
    """Of its bytes, the sender's."""

    def drop(self) -> None:
        """Nobody will take it."""
        self.lease.release()


@dataclass
class Mailbox:
    """Where pushes to one session wait for their step."""

    opening: pb.Open
    dropped: int = 0
    _waiting: deque[Pushed] = field(default_factory=deque)
    _arrived: trio.Event = field(default_factory=trio.Event)

    def put(self, pushed: Pushed) -> None:
        """Keep a push; the oldest makes room."""
        if len(self._waiting) == MAX_EARLY:
            self._waiting.popleft().drop()
            self.dropped += 1
        self._waiting.append(pushed)
        self._arrived.set()

    def clear(self) -> None:
        """The session has ended."""
        while self._waiting:
            self._waiting.popleft().drop()

    async def take(self, step: pb.Step) -> Pushed:
        """Wait for the push that `step` announces; others are dropped."""
        while True:
            while self._waiting:
                pushed = self._waiting.popleft()
                if (
                    pushed.sender == step.pushed_by
                    and pushed.push.step_id == step.step_id
                    and pushed.push.hidden.shape == step.hidden.shape
                ):
                    return pushed
                pushed.drop()
                self.dropped += 1
            self._arrived = trio.Event()
            await self._arrived.wait()
