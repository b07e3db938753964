"""Addresses on the command line that nobody would miss until others look for us there."""

from __future__ import annotations

from collections.abc import Sequence

from petals.protocols.errors import UserError


def check_addresses(flag: str, addrs: Sequence[str], *, named: bool) -> None:
    """
    Args:
        named: each must say which peer answers there.
    Raises:
        UserError: one is no multiaddr, or names nobody.
    """
    from petals.peer.transport.addresses import split_peer

    for addr in addrs:
        try:
            fine = split_peer(addr)[1] is not None or not named
        except ValueError:
            fine = False
        if not fine:
            raise UserError(f"{flag} {addr}: not of the form /ip4/<ip>/tcp/<port>{'/p2p/<peer id>' * named}")
