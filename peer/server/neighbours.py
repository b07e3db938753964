"""Round trips to servers that may come next to us on a route: measured, and published in our record."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import trio

from petals.dht.directory import Directory
from petals.dht.records import ServerRecord, ServerState
from petals.peer.concurrency import gather
from petals.peer.host import Host
from petals.protocols.errors import PeerUnreachable, SwarmError
from petals.protocols.types import ModelId, PeerId

MAX_NEIGHBOURS = 16
PING_S = 2.0


class Neighbours:
    """Keeps `round_trips_s` fresh while `run` runs."""

    def __init__(
        self, host: Host, directory: Directory, model: ModelId, held: Callable[[], range], every_s: float
    ) -> None:
        self.round_trips_s: dict[PeerId, float] = {}
        self._host = host
        self._directory = directory
        self._model = model
        self._held = held
        self._every_s = every_s

    async def run(self) -> None:
        """Measure now and every `every_s` seconds until cancelled."""
        while True:
            with contextlib.suppress(SwarmError):  # the directory is out of reach: the next time will do
                await self.measure(await self._directory.lookup(self._model))
            await trio.sleep(self._every_s)

    async def measure(self, records: Sequence[ServerRecord]) -> None:
        """Ping the likeliest of them, all at once; who does not answer is dropped."""
        peers = likely_neighbours(records, self._host.peer_id, self._held())
        answers = await gather([partial(self._ping, peer_id) for peer_id in peers])
        self.round_trips_s = {
            peer_id: answer for peer_id, answer in zip(peers, answers, strict=True) if isinstance(answer, float)
        }

    async def _ping(self, peer_id: PeerId) -> float:
        with trio.move_on_after(PING_S):
            return await self._host.ping(peer_id)
        raise PeerUnreachable("no pong", peer_id)


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
