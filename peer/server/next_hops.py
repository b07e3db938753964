"""Round trips to servers that may come next to us on a route: measured, and published in our record."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import trio

from petals.dht.directory import Directory
from petals.dht.records import ServerRecord, ServerState
from petals.peer.net.host import Host
from petals.peer.net.round_trips import RoundTrips
from petals.protocols.errors import SwarmError
from petals.protocols.types import ModelId, PeerId

MAX_NEIGHBOURS = 16


class Neighbours:
    """Keeps round trips fresh while `run` runs."""

    def __init__(
        self, host: Host, directory: Directory, model: ModelId, held: Callable[[], range], every_s: float
    ) -> None:
        self._me = host.peer_id
        self._round_trips = RoundTrips(host)
        self._directory = directory
        self._model = model
        self._held = held
        self._every_s = every_s

    @property
    def round_trips_s(self) -> dict[PeerId, float]:
        """Those measured so far."""
        return dict(self._round_trips.seconds)

    async def run(self) -> None:
        """Look around now and every `every_s` seconds until cancelled; measure who is new or due."""
        while True:
            with contextlib.suppress(SwarmError):  # the directory is out of reach: the next time will do
                records = await self._directory.lookup(self._model)
                await self._round_trips.refresh(likely_neighbours(records, self._me, self._held()))
            await trio.sleep(self._every_s)


def likely_neighbours(records: Sequence[ServerRecord], me: PeerId, held: range) -> list[PeerId]:
    """Servers whose blocks can follow ours on a route, the fastest first. A leg is measured by who sends on it; routing
    takes it for both directions."""
    after = [
        record
        for record in records
        if record.peer_id != me
        and record.state is ServerState.ONLINE
        and record.blocks.start <= held.stop < record.blocks.stop
    ]
    after.sort(key=lambda record: (-record.inference_rps, record.peer_id))
    return [record.peer_id for record in after[:MAX_NEIGHBOURS]]
