"""The ladder: how others reach this peer, found out and kept true without being told.

    direct    others dial an address that we listen on
    mapped    our router lets them in: a forwarded port, or one that it opened when asked (UPnP)
    relayed   a relay hands their calls on; both ends then try to meet without it (transport/traversal.py)
    hidden    behind a router, and no relay has been found

Nothing central is asked. Other peers dial us back and say whether that worked (AutoNAT); relays are found in the
directory, where every peer that relays provides one key.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

import trio

from petals.dht.directory import Directory
from petals.dht.keys import RELAY_KEY
from petals.peer.base.concurrency import shielded_for
from petals.peer.base.config import NatConfig
from petals.peer.membership.upnp import RENEW_S, PortMapping, open_port
from petals.peer.net.host import Host
from petals.protocols.errors import RequestRefused, SwarmError
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

CHECK_S = 2.0
"""Between two looks at our relays."""
ASK_AGAIN_S = 600.0
"""Between two rounds of dial-backs."""
ASK_SOON_S = 10.0
"""The same while nobody has been able to say."""
ASK_OF = 3
"""Peers that are asked to dial back; one success is enough, since a failure may be theirs."""
WANTED_PLACES = 2
"""Relays: when one goes, the other carries on."""
AVOID_S = 30.0
"""The longest pause between two calls on a relay that does not answer; one that refused is left alone ten times as
long."""
ROUTER_S = 2.0
"""What giving a port back may take of leaving; else its lease ends by itself."""
PROVIDE_S = 600.0
SEARCH_S = 10.0
MAX_RELAYS = 64
"""Known at once."""


class Reach(StrEnum):
    """How others reach this peer."""

    UNKNOWN = "unknown"
    LOCAL = "local"
    """Listens on this machine only."""
    DIRECT = "direct"
    MAPPED = "mapped"
    RELAYED = "relayed"
    HIDDEN = "hidden"


def _without_relays(addrs: Sequence[str]) -> list[str]:
    return [addr for addr in addrs if "/p2p-circuit" not in addr]


def judge(answers: Sequence[bool]) -> bool | None:
    """Whether others can dial us, as those say who tried; None: nobody tried."""
    return None if not answers else any(answers)


@dataclass
class _Place:
    """A relay that keeps a place for us."""

    renew_at: float


@dataclass
class _Known:
    addrs: tuple[str, ...]
    avoid_until: float = 0.0
    failures: int = 0
    """In a row."""


@dataclass
class Ladder:
    """Climbs until cancelled; `reach` says where it stands.

    Args:
        on_change: called when our addresses have changed, so that others are told at once.
        progress: told in one line what was found.
    """

    host: Host
    directory: Directory
    config: NatConfig
    on_change: Callable[[], None]
    progress: Callable[[str], None]
    reach: Reach = Reach.UNKNOWN
    _places: dict[PeerId, _Place] = field(default_factory=dict)
    _relays: dict[PeerId, _Known] = field(default_factory=dict)
    _mapping: PortMapping | None = None
    _renew_at: float = 0.0
    _ask_at: float = 0.0
    _provide_at: float = 0.0
    _search_at: float = 0.0

    async def run(self) -> None:
        """Look, and look again."""
        if self.config.relay is not None:
            self.host.traversal.start_relaying(self.config.relay, lambda: self.host.addrs)
        try:
            await self._climb()
        finally:
            if self._mapping is not None:
                with shielded_for(ROUTER_S):
                    await trio.to_thread.run_sync(self._mapping.close, abandon_on_cancel=True)  # type: ignore[call-arg]

    async def _climb(self) -> None:
        before = (self.reach, self.host.addrs)
        while True:
            if _without_relays(self.host.addrs) != _without_relays(before[1]):
                self._ask_at = 0.0  # another network, perhaps: how others reach us is open again
            await self._look()
            if (self.reach, self.host.addrs) != before:
                self.host.reach = self.reach
                if self.reach is not before[0] and self.reach in _WORDS:
                    self.progress(_WORDS[self.reach])
                before = (self.reach, self.host.addrs)
                self.on_change()
            if self.reach is Reach.LOCAL and self.config.relay is None:
                return  # that will not change
            await trio.sleep(CHECK_S)

    async def _look(self) -> None:
        now = trio.current_time()
        if self._mapping is not None and now >= self._renew_at:
            await self._renew(self._mapping)
        if self.host.port is None:
            self.reach = Reach.RELAYED if self._places else Reach.HIDDEN
        elif not self.host.listens_outside and not self.config.relays:
            self.reach = Reach.LOCAL
        elif now >= self._ask_at:
            await self._ask_around()
            self._ask_at = trio.current_time() + (ASK_SOON_S if self.reach is Reach.UNKNOWN else ASK_AGAIN_S)
        if self.reach in (Reach.RELAYED, Reach.HIDDEN) or (self.reach is Reach.UNKNOWN and self.config.relays):
            await self._keep_places()
        elif self._places:
            self._leave_all()
        if self.host.traversal.relay is not None and self.reach not in (Reach.RELAYED, Reach.HIDDEN):
            await self._offer()

    # -- can others dial us? -----------------------------------------------------------------------------------------

    async def _ask_around(self) -> None:
        """Set `reach`, as far as others can tell."""
        traversal = self.host.traversal
        helpers = [peer for peer in self.host.connected_peers() if traversal.link(peer) == "direct"]
        helpers = random.sample(helpers, min(ASK_OF, len(helpers)))
        direct = judge(await self._dial_backs(helpers, _without_relays(self.host.addrs)))
        if direct is None:
            return  # nobody to ask: it stays as it was
        if direct:
            self.reach = Reach.DIRECT
            return
        seen = [await self._seen_by(helper) for helper in helpers[:1]]
        outside = [addr for addr in seen if addr is not None]
        if outside and judge(await self._dial_backs(helpers, outside)):
            traversal.extra_addrs = tuple(outside)
            self.reach = Reach.MAPPED
            return
        if self.config.upnp and (port := self.host.port) is not None:
            # Abandoned when the peer leaves: it takes seconds, and at worst a port stays mapped until its lease ends.
            self._mapping = await trio.to_thread.run_sync(open_port, port, abandon_on_cancel=True)  # type: ignore[call-arg]
            self._renew_at = trio.current_time() + RENEW_S
            if self._mapping is not None and judge(await self._dial_backs(helpers, [self._mapping.addr])):
                traversal.extra_addrs = (self._mapping.addr,)
                self.reach = Reach.MAPPED
                return
        if self.reach is not Reach.MAPPED or judge(await self._dial_backs(helpers, traversal.extra_addrs)) is False:
            traversal.extra_addrs = ()
            self.reach = Reach.RELAYED if self._places else Reach.HIDDEN

    async def _renew(self, mapping: PortMapping) -> None:
        self._renew_at = trio.current_time() + RENEW_S
        if not await trio.to_thread.run_sync(mapping.renew, abandon_on_cancel=True):  # type: ignore[call-arg]
            self._mapping = None
            self._ask_at = 0.0  # a router that was started anew, perhaps: from the beginning

    async def _dial_backs(self, helpers: Sequence[PeerId], addrs: Sequence[str]) -> list[bool]:
        answers = []
        for helper in helpers if addrs else ():
            try:
                answers.append(await self.host.traversal.ask_dial_back(helper, addrs))
            except SwarmError as error:  # it may not know the protocol
                log.debug("no dial-back by …%s: %s", helper[-6:], error)
                continue
            if answers[-1]:
                break
        return answers

    async def _seen_by(self, helper: PeerId) -> str | None:
        try:
            return await self.host.traversal.see(helper)
        except SwarmError as error:
            log.debug("…%s can not say where it sees us: %s", helper[-6:], error)
            return None

    # -- relays ------------------------------------------------------------------------------------------------------

    async def _keep_places(self) -> None:
        for relay in [relay for relay in self._places if not self.host.is_connected(relay)]:
            log.info("relay …%s is gone", relay[-6:])
            self._drop(relay)
        for relay, place in list(self._places.items()):
            if trio.current_time() >= place.renew_at:
                await self._take(relay)
        if len(self._places) < WANTED_PLACES:
            await self._find_relays()
            now = trio.current_time()
            for relay, known in list(self._relays.items()):
                if len(self._places) < WANTED_PLACES and relay not in self._places and now >= known.avoid_until:
                    await self._take(relay)
        if self._places:
            self.reach = Reach.RELAYED
        elif self.reach is Reach.RELAYED:
            self.reach = Reach.HIDDEN

    async def _find_relays(self) -> None:
        for addr in self.config.relays:
            relay = PeerId(addr.rpartition("/p2p/")[2])
            self._relays.setdefault(relay, _Known((addr,)))
        if not self.config.relays and trio.current_time() >= self._search_at:
            self._search_at = trio.current_time() + SEARCH_S
            if len(self._relays) > MAX_RELAYS:
                self._relays = {relay: self._relays[relay] for relay in self._places}
            found = await self.directory.find_providers(RELAY_KEY)
            for relay in random.sample(sorted(found), min(len(found), 4 * WANTED_PLACES)):
                self._relays.setdefault(relay, _Known(found[relay]))

    async def _take(self, relay: PeerId) -> None:
        known = self._relays[relay]
        try:
            holds_s = await self.host.traversal.reserve(relay, known.addrs)
        except SwarmError as error:
            log.info("no place at relay …%s: %s", relay[-6:], error)
            self._drop(relay)
            # One that restarts is back within seconds; one that is full stays so for minutes.
            away_s = min(AVOID_S, CHECK_S * 2.0**known.failures)
            known.failures += 1
            known.avoid_until = trio.current_time() + (10 * AVOID_S if isinstance(error, RequestRefused) else away_s)
            return
        known.failures = 0
        self._places[relay] = _Place(trio.current_time() + holds_s / 2)

    def _drop(self, relay: PeerId) -> None:
        self._places.pop(relay, None)
        self.host.traversal.leave(relay)

    def _leave_all(self) -> None:
        for relay in list(self._places):
            self._drop(relay)

    async def _offer(self) -> None:
        """Tell the directory that we relay."""
        if trio.current_time() >= self._provide_at:
            self._provide_at = trio.current_time() + PROVIDE_S
            with suppress(SwarmError):
                await self.directory.provide(RELAY_KEY)


_WORDS = {
    Reach.DIRECT: "others reach this peer directly",
    Reach.MAPPED: "others reach this peer through a port of the router",
    Reach.RELAYED: "behind a router: others reach this peer through a relay",
    Reach.HIDDEN: "behind a router, and no relay was found: others can not reach this peer; give --relays ADDR, or "
    "start a peer with --relay where others can dial it",
}
