"""Asking the router for a port (UPnP IGD), with miniupnpc, which py-libp2p depends on."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

DISCOVER_MS = 2000
LEASE_S = 7200
"""A peer that dies leaves the port open no longer than this."""


def open_port(port: int) -> str | None:
    """Map an outer TCP port of the router to ours; the multiaddr outside, None: no router does that. Takes seconds and
    blocks."""
    import miniupnpc  # type: ignore[import-not-found, import-untyped, unused-ignore]  # here: few peers need it

    gateway = miniupnpc.UPnP()
    gateway.discoverdelay = DISCOVER_MS
    try:
        if not gateway.discover():
            return None
        gateway.selectigd()
        outside = gateway.externalipaddress()
        outer = port
        while gateway.getspecificportmapping(outer, "TCP") is not None and outer < port + 16:
            outer += 1  # somebody else's
        gateway.addportmapping(outer, "TCP", gateway.lanaddr, port, "petals", "", LEASE_S)
    except Exception as error:  # the C library raises bare Exceptions
        log.info("the router opens no port: %s", error)
        return None
    return f"/ip4/{outside}/tcp/{outer}" if outside else None
