"""Keeps a server's signed record fresh in the directory, and takes it back on the way out."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace

import trio

from petals.dht.directory import Directory
from petals.dht.records import ServerRecord, ServerState
from petals.peer.base.concurrency import shielded_for
from petals.protocols.errors import SwarmError

log = logging.getLogger(__name__)


SOON_S = 2.0
"""A newcomer knows few nodes, and few know it: its first announcement may miss most of those nearest to the key, so it
is said again after this long, after twice this, and so on, until the usual pace is reached."""


class Announcer:
    """Announces what `describe` says, at every `every_s` seconds and whenever the state changes.

    The record expires after three times that: a server that dies without a word is remembered no longer.
    """

    def __init__(
        self,
        directory: Directory,
        describe: Callable[[], ServerRecord],
        every_s: float,
        clock: Callable[[], float] = time.time,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._directory = directory
        self._describe = describe
        self._every_s = every_s
        self._clock = clock
        self._dice = dice
        self._sequence = int(clock() * 1000)  # a restarted server must not be older than its own past
        self._state = ServerState.JOINING
        self._pause_s = min(SOON_S, every_s)
        self._renewed = trio.Event()

    @property
    def state(self) -> ServerState:
        return self._state

    def record(self) -> ServerRecord:
        """The record as of now, with a sequence number above all earlier ones."""
        now = self._clock()
        self._sequence = max(self._sequence + 1, int(now * 1000))
        return replace(
            self._describe(),
            state=self._state,
            sequence=self._sequence,
            issued_at=now,
            expires_at=now + 3 * self._every_s,
        )

    async def enter(self, state: ServerState) -> None:
        """Change the state and tell the swarm now. A directory that does not answer is tried again later."""
        self._state = state
        await self._announce()

    async def renew(self) -> None:
        """Something has changed that others should know now, or others may have forgotten what they knew."""
        if self._state is not ServerState.OFFLINE:
            self._pause_s = min(SOON_S, self._every_s)
            self._renewed.set()
            await self._announce()

    async def run(self) -> None:
        """Renew the record until cancelled; soon and often at first. Pauses vary by half, so that servers that came
        together do not all speak at once for ever."""
        while True:
            self._renewed = trio.Event()
            with trio.move_on_after(self._pause_s * (0.5 + self._dice())):
                await self._renewed.wait()
                continue  # said already, and soon again
            self._pause_s = min(2 * self._pause_s, self._every_s)
            await self._announce()

    async def leave(self, within_s: float) -> None:
        """Say OFFLINE, even while being cancelled; bounded."""
        self._state = ServerState.OFFLINE
        with shielded_for(within_s):
            try:
                await self._directory.withdraw(self.record())
            except SwarmError as error:
                log.warning("could not withdraw the record: %s (it expires by itself)", error)

    async def _announce(self) -> None:
        try:
            await self._directory.announce(self.record())
        except SwarmError as error:
            log.warning("could not announce: %s; trying again in %.0f s", error, self._every_s)
