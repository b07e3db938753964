"""Which addresses we dial: nobody makes us dial third parties.

Theory. Almost every address comes from somebody else: from identify, from the directory, from records, from a client
that wants an answer pushed, from hole punching. Who names an address costs us a connection there, and lets us knock
where only we can: at our own machine, in our own network. Three rules bound that.

1. Reach. An address belongs to a reach: this machine (loopback), a private network, or the Internet. Who talks to us
   from one of them may name addresses of the same or a wider one: a peer on the Internet no private address, a peer in
   our network no loopback address. Where the namer is not known, the narrowest reach of our live connections and of the
   addresses that the user gave counts. Until we know anybody, only the user can have named addresses: all are dialled.
2. Failures. A dial that finds nobody, or somebody else than was named, is charged to its IP address, whoever named it.
   An IP address with too many is not dialled for a while. So all peers together, with all the names they can make up,
   get `FAILURES_BURST` dials of ours to a third party, and one more each `1 / FAILURES_PER_S` seconds. What the user
   gave is free of that, and so are loopback addresses, which the first rule keeps from strangers.
3. Hole punching dials before anybody could be verified: few addresses, few times, and at a rate for each peer that asks
   for it and for all of them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv6Address, ip_address

from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.peer.base.rate_limit import Conduct
from petals.peer.net.wire.addresses import circuit_of, ip_of

FAILURES_PER_S = 0.1
FAILURES_BURST = 8
PUNCHES_PER_S, PUNCHES_BURST = 1 / 30, 3
"""Of one peer that asks for it: each is up to three attempts."""
ALL_PUNCHES_PER_S, ALL_PUNCHES_BURST = 1.0, 30
DIAL_BACKS_PER_S, DIAL_BACKS_BURST = 0.5, 16
"""To one IP address, for those who ask from there whether they can be dialled."""
PUNCH_ADDRS = 4
PUNCH_DIALS = 16
"""Of one address in one attempt: a router that lets nobody in may refuse at once, and again."""
MAX_TRUSTED = 256


class Reach(enum.IntEnum):
    """From where an address can be reached; the wider, the larger."""

    NOWHERE = 0
    """Nobody's: multicast, reserved, unspecified."""
    MACHINE = 1
    NETWORK = 2
    INTERNET = 3


def reach_of(ip: str) -> Reach:
    """Of an IP address; those that stand for an IPv4 address have its reach."""
    try:
        address = ip_address(ip.partition("%")[0])
    except ValueError:
        return Reach.NOWHERE
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or address.sixtofour or address
    if address.is_loopback:
        return Reach.MACHINE
    if address.is_multicast or address.is_unspecified or address.is_reserved:
        return Reach.NOWHERE
    return Reach.INTERNET if address.is_global else Reach.NETWORK


class DialPolicy:
    """What may be dialled. Pure, but for the clock and what is asked of the network.

    Args:
        seen_ips: the IP addresses of all live connections, as we see them; of those through relays, the relays'.
        clock: seconds.
    """

    def __init__(self, seen_ips: Callable[[], Iterable[str]], clock: Callable[[], float]) -> None:
        self._seen_ips = seen_ips
        self._trusted: dict[str, None] = {}
        self._failures = Conduct[str](FAILURES_PER_S, FAILURES_BURST, clock)
        self._punches = Conduct[str](PUNCHES_PER_S, PUNCHES_BURST, clock)
        self._dial_backs = Conduct[str](DIAL_BACKS_PER_S, DIAL_BACKS_BURST, clock)
        self._all_punches = Conduct[str](ALL_PUNCHES_PER_S, ALL_PUNCHES_BURST, clock)

    def trust(self, addrs: Iterable[str]) -> None:
        """The user gave these addresses."""
        for addr in addrs:
            ip = _ip_on_the_way(addr)
            if ip is not None and len(self._trusted) < MAX_TRUSTED:
                self._trusted[ip] = None

    def plausible(self, addrs: Sequence[str], namer_ip: str | None) -> list[str]:
        """Those that somebody at `namer_ip` (None: not known) may name."""
        narrowest = self._narrowest() if namer_ip is None else reach_of(namer_ip)
        return [addr for addr in addrs if _may_be(addr, narrowest)]

    def objection(self, ip: str) -> str | None:
        """Why this IP address is not dialled now; None: it is."""
        if ip in self._trusted:
            return None
        reach = reach_of(ip)
        if reach is Reach.NOWHERE:
            return "no address of a peer"
        if reach < self._narrowest():
            return "an address of another network"
        if reach is not Reach.MACHINE and self._failures.wait_s(ip) > 0:
            return "too many dials there have failed lately"
        return None

    def failed(self, ip: str) -> None:
        """A dial found nobody, or somebody else than was named."""
        if ip not in self._trusted and reach_of(ip) is not Reach.MACHINE:
            self._failures.charge(ip)

    def may_punch(self, peer_id: str) -> bool:
        """Whether a hole may be punched for that peer now; it is counted."""
        if self._punches.wait_s(peer_id) > 0 or self._all_punches.wait_s("all") > 0:
            return False
        self._punches.charge(peer_id)
        self._all_punches.charge("all")
        return True

    def may_dial_back(self, ip: str) -> bool:
        """Whether somebody there may be dialled back now; it is counted."""
        if self._dial_backs.wait_s(ip) > 0:
            return False
        self._dial_backs.charge(ip)
        return True

    def _narrowest(self) -> Reach:
        """The narrowest reach that somebody who named an address may have."""
        known = [reach_of(ip) for ip in (*self._seen_ips(), *self._trusted)]
        return min(known, default=Reach.MACHINE)


def _may_be(addr: str, narrowest: Reach) -> bool:
    ip = _ip_on_the_way(addr)
    return ip is None or reach_of(ip) >= max(narrowest, Reach.MACHINE)  # a name is looked at once it is resolved


def _ip_on_the_way(addr: str) -> str | None:
    """The IP address that is dialled for `addr`, that of the relay for a circuit; None: a name, or nonsense."""
    try:
        parsed = Multiaddr(addr)
        circuit = circuit_of(parsed)
        return ip_of(circuit.relay_addr if circuit is not None else parsed)
    except Exception:  # multiaddr raises half a dozen unrelated kinds
        return None
