"""Multiaddrs taken apart: what can be dialled how. All of it comes from strangers."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import NamedTuple

from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]


class Circuit(NamedTuple):
    """A way through a relay."""

    relay: ID
    relay_addr: Multiaddr
    """Without /p2p/."""


def parse_addrs(raw: Iterable[bytes]) -> tuple[Multiaddr, ...]:
    """Those of the binary addresses that make sense."""
    addrs = []
    for each in raw:
        try:
            addr = Multiaddr(each)
            str(addr)
        except Exception:  # multiaddr raises half a dozen unrelated kinds
            continue
        addrs.append(addr)
    return tuple(addrs)


def tcp_endpoint(addr: Multiaddr) -> tuple[str, int]:
    """Host and port of a plain TCP address.

    Raises:
        SwarmException: it is another kind of address.
    """
    parts = [(part.name, value) for part, value in addr.items()]
    hosts = [str(value) for name, value in parts[:1] if name in ("ip4", "ip6", "dns", "dns4", "dns6")]
    ports = [str(value) for name, value in parts[1:2] if name == "tcp"]
    if not hosts or not ports or any(name != "p2p" for name, _ in parts[2:]):
        raise SwarmException("not a plain TCP address")
    return hosts[0], int(ports[0])


def circuit_of(addr: Multiaddr) -> Circuit | None:
    """The relay of /ip4/.../tcp/.../p2p/<relay>/p2p-circuit[/p2p/<peer>]; None: it is another kind of address.

    Raises:
        SwarmException: a way through a relay that says not where that is.
    """
    names = [part.name for part in addr.protocols()]
    if "p2p-circuit" not in names:
        return None
    relay_addr = str(addr).partition("/p2p-circuit")[0]
    where, slash, name = relay_addr.rpartition("/p2p/")
    if not slash or names.count("p2p-circuit") != 1:
        raise SwarmException("no address of the relay")
    try:
        return Circuit(ID.from_base58(name), Multiaddr(where))
    except Exception:  # base58 and multiaddr raise half a dozen unrelated kinds
        raise SwarmException("no address of the relay") from None


def ip_of(addr: Multiaddr) -> str | None:
    """The IP address at its beginning; None: it has none, or goes through a relay."""
    parts = [(part.name, value) for part, value in addr.items()]
    if not parts or parts[0][0] not in ("ip4", "ip6") or any(name == "p2p-circuit" for name, _ in parts):
        return None
    return str(parts[0][1])


def house_of(ip: str) -> str:
    """What one stranger can be counted by: an IP address, or of version 6 its network, since everybody has many."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    if not isinstance(address, ipaddress.IPv6Address):
        return ip
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


def is_loopback(addr: Multiaddr) -> bool:
    ip = ip_of(addr)
    return ip is not None and ipaddress.ip_address(ip).is_loopback


def split_peer(addr: str) -> tuple[Multiaddr, ID | None]:
    """A multiaddr without its last /p2p/, and whom that names; None: it names nobody. A relay on the way is not meant.

    Raises:
        ValueError: it makes no sense.
    """
    try:
        str(Multiaddr(addr))
        where, slash, name = addr.rpartition("/p2p/")
        if slash and "/" not in name:
            return Multiaddr(where), ID.from_base58(name)
        return Multiaddr(addr), None
    except Exception:  # multiaddr and base58 raise half a dozen unrelated kinds
        raise ValueError(f"{addr[:200]!r} is no multiaddr") from None
