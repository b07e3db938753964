"""Addresses on the command line that nobody would miss until others look for us there."""

from __future__ import annotations

from collections.abc import Sequence

from petals.protocols.errors import UserError

EXAMPLE = "/ip4/203.0.113.5/tcp/31337"
EXAMPLE_ID = "12D3KooWHtURmmUjrRwSiMY8FcjtDevyhTTAQAMRfBKuz8ErYeAT"


def check_addresses(flag: str, addrs: Sequence[str], *, named: bool) -> None:
    """
    Args:
        named: each must say which peer answers there.
    Raises:
        UserError: one is no multiaddr, or names nobody.
    """
    from petals.peer.net.wire.addresses import split_peer

    for addr in addrs:
        try:
            fine = split_peer(addr)[1] is not None or not named
        except ValueError:
            fine = False
        if not fine:
            form = f"/ip4/<ip>/tcp/<port>{'/p2p/<peer id>' * named}"
            raise UserError(f"{flag} {addr}: not of the form {form}, such as {EXAMPLE}{f'/p2p/{EXAMPLE_ID}' * named}")


def check_listen(addrs: Sequence[str]) -> None:
    """Before anything is started that would listen there.

    Raises:
        UserError: one is no multiaddr of TCP.
    """
    from petals.peer.net.host import parse_listen

    for addr in addrs:
        parse_listen(addr)
