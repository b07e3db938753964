"""What this client knows about a model's swarm: a frozen view, kept fresh by one task."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from petals.dht.directory import Directory
from petals.dht.records import ServerRecord, ServerState
from petals.peer.client.routing.routing import Route
from petals.peer.client.routing.speeds import Speeds
from petals.peer.net.host import Host
from petals.peer.net.round_trips import RoundTrips
from petals.protocols.errors import (
    Forbidden,
    MissingBlocks,
    PeerUnreachable,
    RemoteError,
    RemoteProtocolError,
    RouteError,
    SwarmError,
    WrongAnswer,
    describe_blocks,
)
from petals.protocols.types import ModelId, PeerId

if TYPE_CHECKING:
    from trio_typing import TaskStatus

log = logging.getLogger(__name__)

SILENCE_BAN_S = 15.0
NONSENSE_BAN_S = 600.0
MAX_BAN_S = 3600.0
LIE_BAN_S = 24 * 3600.0
FORGIVE_S = 600.0
"""After this long without a new offence a peer's next ban starts from the shortest again."""
MISSING_REFRESH_S = 0.5
"""How soon to look again while blocks are missing, and after reports, which come in crowds."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One server as the router sees it."""

    record: ServerRecord
    round_trip_s: float | None
    """Between us and it; None: not measured."""
    ban_left_s: float = 0.0
    measured_block_s: float | None = None
    """What a decode step really took there, per block, by our clock; None: not measured."""


@dataclass(frozen=True, slots=True)
class SwarmView:
    """All servers of one model, as of one moment; `offers` are those that are online."""

    model: ModelId
    offers: tuple[Offer, ...] = ()
    away: tuple[Offer, ...] = ()
    """Servers that are joining or leaving: never asked, but it may be told why."""

    def missing(self, blocks: range) -> list[int]:
        """The blocks nobody holds."""
        held = {block for offer in self.offers for block in offer.record.blocks}
        return [block for block in blocks if block not in held]


@dataclass
class Ban:
    """Grows with every offence, is forgotten after a while."""

    until: float
    seconds: float


@dataclass
class Bans:
    """Whom to avoid, and for how long. The type of the error decides; our own bugs ban nobody."""

    clock: Callable[[], float]
    _bans: dict[PeerId, Ban] = field(default_factory=dict)
    _liars: dict[PeerId, float] = field(default_factory=dict)

    @property
    def liars(self) -> frozenset[PeerId]:
        """Who has been caught, within the last day."""
        now = self.clock()
        return frozenset(peer_id for peer_id, until in self._liars.items() if now < until)

    def report(self, peer_id: PeerId, error: RemoteError) -> None:
        """Note an offence: silence is banned shortly, nonsense for long, being busy or refusing not at all; who serves
        others and not us is no offender, but not worth asking again soon. Who lies is not asked for a day, not even
        when nobody else is there."""
        if isinstance(error, WrongAnswer):
            self._liars[peer_id] = self.clock() + LIE_BAN_S
            self._bans[peer_id] = Ban(self._liars[peer_id], LIE_BAN_S)
            return
        if isinstance(error, RemoteProtocolError | Forbidden):
            first_s = NONSENSE_BAN_S
        elif isinstance(error, PeerUnreachable):
            first_s = SILENCE_BAN_S
        else:
            return
        now = self.clock()
        known = self._bans.get(peer_id)
        repeated = known is not None and now < known.until + FORGIVE_S
        seconds = min(MAX_BAN_S, max(first_s, 2 * known.seconds if known is not None and repeated else 0.0))
        self._bans[peer_id] = Ban(now + seconds, seconds)

    def left_s(self, peer_id: PeerId) -> float:
        """Seconds until the peer may be asked again; 0 if it may be now."""
        known = self._bans.get(peer_id)
        return max(0.0, known.until - self.clock()) if known is not None else 0.0


class SwarmWatcher:
    """Keeps the view of one model. `run` must be running."""

    def __init__(
        self,
        host: Host,
        directory: Directory,
        model: ModelId,
        *,
        update_s: float,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self.model = model
        self._directory = directory
        self._update_s = update_s
        self._bans = Bans(clock)
        self._records: dict[PeerId, ServerRecord] = {}
        self._round_trips = RoundTrips(host, clock)
        self._speeds = Speeds(clock)
        self._changed = trio.Event()
        self._refresh_now = trio.Event()

    @property
    def view(self) -> SwarmView:
        """The swarm as known now."""
        known = [
            Offer(
                record,
                self._round_trips.seconds.get(peer_id),
                self._bans.left_s(peer_id),
                self._speeds.block_s(peer_id),
            )
            for peer_id, record in sorted(self._records.items())
        ]
        online = tuple(offer for offer in known if offer.record.state is ServerState.ONLINE)
        away = tuple(offer for offer in known if offer.record.state is not ServerState.ONLINE)
        return SwarmView(self.model, online, away)

    @property
    def dtypes(self) -> frozenset[str]:
        """What the servers compute in. Unlike `view` it may be asked in any thread: bans ask trio for the time."""
        records = list(self._records.values())
        return frozenset(record.dtype for record in records if record.state is ServerState.ONLINE)

    @property
    def liars(self) -> frozenset[PeerId]:
        """Who must not be asked."""
        return self._bans.liars

    def report(self, peer_id: PeerId, error: RemoteError) -> None:
        """Tell the view what went wrong with a peer; it looks around again at once."""
        self._bans.report(peer_id, error)
        if isinstance(error, PeerUnreachable):
            self._records.pop(peer_id, None)  # it comes back with the next lookup that it answers
            self._directory.forget(self.model, peer_id)
        self._refresh_now.set()

    def note_step(self, peer_id: PeerId, blocks: int, seconds: float) -> None:
        """A step of one token took so long at a server, the way there and back included."""
        self._speeds.note(peer_id, blocks, seconds - (self._round_trips.seconds.get(peer_id) or 0.0))

    async def changed(self, within_s: float) -> None:
        """Return when the view has been renewed, or after `within_s`."""
        self._refresh_now.set()
        with trio.move_on_after(within_s):
            await self._changed.wait()

    async def wait_for(self, blocks: range, deadline: float) -> None:
        """Wait until every block has a holder.

        Args:
            deadline: trio time.
        Raises:
            MissingBlocks: names those nobody holds, and how long was waited.
        """
        started = trio.current_time()
        while missing := self.view.missing(blocks):
            left = deadline - trio.current_time()
            if left <= 0:
                waited = trio.current_time() - started
                known = [*self._directory.refusals.sentences(), *await self._directory.look_for_namesake(self.model)]
                advice = "Start a peer that serves them, with the same model, and join it to this swarm."
                raise MissingBlocks(
                    missing,
                    f"no peer of the swarm holds {describe_blocks(missing)} of {self.model.name} "
                    f"(checkpoint {self.model.digest[:12]}); waited {waited:.0f} s. "
                    + (". ".join(sentence[:1].upper() + sentence[1:] for sentence in known) + "." if known else advice),
                )
            await self.changed(min(left, 5.0))

    async def route(
        self,
        find_route: Callable[[range, frozenset[PeerId]], Route],
        blocks: range,
        avoid: frozenset[PeerId],
        within_s: float,
    ) -> Route:
        """A route, waiting for the swarm to heal if there is none now; rather with whom to avoid than not at all."""
        deadline = trio.current_time() + within_s
        while True:
            for avoided in (avoid, frozenset[PeerId]()):
                try:
                    return find_route(blocks, avoided)
                except RouteError:
                    if trio.current_time() >= deadline and not avoided:
                        raise
            await self.changed(max(0.0, min(1.0, deadline - trio.current_time())))

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Renew the view until cancelled. Started: the first lookup has ended."""
        first = True
        while True:
            self._refresh_now = trio.Event()
            await self._refresh()
            if first:
                task_status.started()
                first = False
            changed, self._changed = self._changed, trio.Event()
            changed.set()
            renewed = trio.current_time()
            with trio.move_on_after(self._update_s):
                await self._refresh_now.wait()
                # At once for the first report: a server that only lost a stream is back before the next one is lost.
                await trio.sleep_until(renewed + MISSING_REFRESH_S)

    async def _refresh(self) -> None:
        try:
            records = await self._directory.lookup(self.model)
        except SwarmError as error:
            log.warning("lookup failed: %s", error)
            return
        self._records = {record.peer_id: record for record in records}
        await self._round_trips.refresh(self._records)
