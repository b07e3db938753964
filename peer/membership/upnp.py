"""Asking the router for a port (UPnP IGD), with miniupnpc, which py-libp2p depends on. Every call blocks."""

from __future__ import annotations

import ipaddress
import logging
from typing import Any

log = logging.getLogger(__name__)

DISCOVER_MS = 2000
LEASE_S = 7200
"""A peer that dies leaves the port open no longer than this; one that lives asks again in time."""
RENEW_S = LEASE_S / 2
_TRIES = 16
"""Outer ports, from our own number on, of which others may have the first."""


class PortMapping:
    """A TCP port of the router that leads to ours. Made by `open_port`; one thread at a time.

    Attributes:
        addr: its multiaddr, outside.
    """

    def __init__(self, gateway: Any, outer: int, port: int, addr: str) -> None:
        self.addr = addr
        self._gateway, self._outer, self._port = gateway, outer, port

    def renew(self) -> bool:
        """Have it for another `LEASE_S`; whether the router agreed."""
        return _map(self._gateway, self._outer, self._port)

    def close(self) -> None:
        """Give it back, if the router listens."""
        try:
            self._gateway.deleteportmapping(self._outer, "TCP")
        except Exception as error:  # the C library raises bare Exceptions
            log.info("the router keeps the port until its lease ends: %s", error)


def open_port(port: int, description_url: str | None = None) -> PortMapping | None:
    """Have the router hand TCP calls on to our `port`; None: there is no router that does, or others have the ports.

    Args:
        description_url: where the router describes itself; None: it is looked for.
    """
    import miniupnpc  # type: ignore[import-not-found, import-untyped, unused-ignore]  # here: few peers need it

    gateway = miniupnpc.UPnP()
    gateway.discoverdelay = DISCOVER_MS
    try:
        if description_url is None:
            if not gateway.discover():
                return None
            gateway.selectigd()
        else:
            gateway.selectigd(description_url)
        outside = _public(gateway.externalipaddress())
        if outside is None:
            return None
        for outer in range(port, min(port + _TRIES, 1 << 16)):
            taken = gateway.getspecificportmapping(outer, "TCP")
            ours = taken is not None and (taken[0], taken[1]) == (gateway.lanaddr, port)
            if taken is None or ours:
                break
        else:
            return None
    except Exception as error:  # the C library raises bare Exceptions
        log.info("the router opens no port: %s", error)
        return None
    return PortMapping(gateway, outer, port, f"/ip4/{outside}/tcp/{outer}") if _map(gateway, outer, port) else None


def _map(gateway: Any, outer: int, port: int) -> bool:
    try:
        return bool(gateway.addportmapping(outer, "TCP", gateway.lanaddr, port, "petals", "", LEASE_S))
    except Exception as error:  # the C library raises bare Exceptions
        log.info("the router opens no port: %s", error)
        return False


def _public(address: str | None) -> str | None:
    """The router's outer address; None: it has none, or stands behind another router itself."""
    try:
        parsed = ipaddress.IPv4Address(address or "")
    except ValueError:
        return None
    return str(parsed) if parsed.is_global else None
