"""Keeping in touch with the swarm: peers that were lost are dialled again, and whoever announces is told.

Theory. A routing table forgets a node that does not answer, and rightly so. If that node was the only way into the
swarm, nothing leads back: a bootstrap that restarts knows nobody, and nobody asks it. So the peers through which we
joined are kept apart from the routing table, for as long as the process lives, and dialled again with growing pauses.
Neighbours (others that we were connected with for a while) are a second way back when every initial peer is gone for
good. They are dialled only while we have few connections, and forgotten after an hour.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from petals.peer.net.host import Host
from petals.peer.net.wire.addresses import split_peer
from petals.protocols.errors import SwarmError, UserError
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

CHECK_S = 0.5
"""Between two looks at who is still connected."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
"""A client waits 20 s for missing blocks (`Timeouts.route_s`), so in the first minute the pauses must be shorter."""
FEW_LINKS = 4
"""With fewer connections than this, lost neighbours are dialled, too."""
MAX_NEIGHBOURS = 16
MET_S = 30.0
"""Who was connected for less than this was passing by, like `petals status`."""
FORGET_S = 3600.0
"""A neighbour that has been away for so long is not dialled any more."""


@dataclass
class Contact:
    """One peer that is dialled again when it is lost. Times are trio's."""

    peer_id: PeerId
    addrs: tuple[str, ...]
    """Full multiaddrs; empty: what the host knows."""
    initial: bool
    """Whether it is one of the initial peers."""
    met_at: float = 0.0
    connected: bool = True
    lost_at: float = 0.0
    failures: int = 0
    next_at: float = 0.0
    dialling: bool = False
    reported: bool = False
    """Whether its absence has been reported."""


class Contacts:
    """Initial peers and neighbours. `run` must be running.

    Args:
        initial_peers: full multiaddrs.
        progress: reports in one line an initial peer that is lost, or back.
        rng: uniform numbers in [0, 1): a crowd that lost the same peer does not dial it in the same moment.
    """

    def __init__(
        self,
        host: Host,
        initial_peers: Sequence[str],
        progress: Callable[[str], None] = log.info,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self.on_return: list[Callable[[], None]] = []
        """Called after a lost peer has been connected to again: it may have forgotten everything."""
        self._host = host
        self._progress = progress
        self._rng = rng
        self._contacts: dict[PeerId, Contact] = {}
        self._somebody = trio.Event()
        for addr in initial_peers:
            peer_id = PeerId(str(split_peer(addr)[1]))
            if peer_id == host.peer_id:
                continue
            known = self._contacts.setdefault(peer_id, Contact(peer_id, (), True, connected=False))
            known.addrs = (*known.addrs, addr)
        host.on_peer(self._note_connected)

    async def somebody(self) -> None:
        """Wait until any peer is connected."""
        if not self._host.connected_peers():
            await self._somebody.wait()

    async def run(self) -> None:
        """Dial lost peers again, until cancelled."""
        for peer_id in self._host.connected_peers():
            self._remember(peer_id)
        for contact in self._contacts.values():
            if not contact.connected:  # joining has reported it
                contact.failures, contact.reported = 1, True
        async with trio.open_nursery() as nursery:
            while True:
                for contact in self._due():
                    contact.dialling = True
                    nursery.start_soon(self._dial, contact)
                await trio.sleep(CHECK_S)

    def _due(self) -> list[Contact]:
        """Note who has been lost since the last look; whom to dial now."""
        now = trio.current_time()
        links = len(self._host.connected_peers())
        due = []
        for contact in list(self._contacts.values()):
            connected = self._host.is_connected(contact.peer_id)
            if contact.connected and not connected:
                contact.lost_at, contact.failures = now, 0
                contact.next_at = now + self._pause_s(contact)
                if not contact.initial and now - contact.met_at < MET_S:
                    del self._contacts[contact.peer_id]
                    continue
            contact.connected = connected
            if connected or contact.dialling or now < contact.next_at:
                continue
            if not contact.initial and now - contact.lost_at > FORGET_S:
                del self._contacts[contact.peer_id]
            elif contact.initial or links < FEW_LINKS:
                due.append(contact)
        return due

    async def _dial(self, contact: Contact) -> None:
        try:
            if contact.initial:
                self._host.trust(contact.addrs)
            await self._host.connect_peer(contact.peer_id, contact.addrs)
        except SwarmError as error:
            contact.failures += 1
            log.debug("…%s is still away: %s", contact.peer_id[-6:], error)
            if contact.initial and not contact.reported:
                contact.reported = True
                self._progress(f"initial peer …{contact.peer_id[-6:]} does not answer; it is dialled again")
        finally:
            contact.dialling = False
            contact.next_at = trio.current_time() + self._pause_s(contact)

    def _pause_s(self, contact: Contact) -> float:
        return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**contact.failures) * (0.75 + 0.5 * self._rng()))

    def _note_connected(self, peer_id: PeerId) -> None:
        self._somebody.set()
        self._remember(peer_id)
        contact = self._contacts.get(peer_id)
        if contact is None or not (contact.lost_at or contact.failures):
            return
        contact.lost_at, contact.failures = 0.0, 0
        if contact.reported:
            contact.reported = False
            self._progress(f"initial peer …{peer_id[-6:]} answers again")
        for callback in self.on_return:
            callback()

    def _remember(self, peer_id: PeerId) -> None:
        contact = self._contacts.get(peer_id)
        if contact is None:
            neighbours = [each for each in self._contacts.values() if not each.initial]
            if len(neighbours) >= MAX_NEIGHBOURS:
                away = min(neighbours, key=lambda each: (each.connected, -each.lost_at))
                if away.connected:
                    return
                del self._contacts[away.peer_id]
            contact = self._contacts[peer_id] = Contact(peer_id, (), initial=False, met_at=trio.current_time())
        contact.connected = True


def without_itself(host: Host, addrs: Sequence[str]) -> list[str]:
    """`addrs` without this peer's own: all peers of a swarm may be given the same list.

    Raises:
        UserError: an address that is none, or one of another process that has the same key.
    """
    others = []
    for addr in addrs:
        try:
            endpoint, claimed = split_peer(addr)
        except ValueError:
            claimed = None
        if claimed is None:
            raise UserError(f"{addr} is no full address: /ip4/<ip>/tcp/<port>/p2p/<peer id>")
        if str(claimed) != host.peer_id:
            others.append(addr)
        elif addr not in host.addrs and f"/tcp/{host.port}" not in str(endpoint):
            raise UserError(
                f"{addr} has this peer's own peer ID: another process uses the same key; give each its own --identity, "
                "or leave the address out if it is this peer's own"
            )
    return others
