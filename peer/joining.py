"""Joining a swarm: at least one of the initial peers must answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from petals.peer.concurrency import gather
from petals.peer.host import Host
from petals.protocols.errors import PeerUnreachable, SwarmError, UserError

log = logging.getLogger(__name__)


async def join(host: Host, addrs: Sequence[str]) -> None:
    """Connect to all of `addrs` at once.

    Raises:
        UserError: an address that is none, or nobody answered; names the address.
    """
    if not addrs:
        return
    results = await gather([partial(host.connect, addr) for addr in addrs])
    failures = [result for result in results if isinstance(result, SwarmError)]
    for failure in failures:
        if not isinstance(failure, PeerUnreachable):
            raise failure
    if len(failures) == len(addrs):
        raise UserError(f"no initial peer answers: {failures[0]}; check the address and that the peer is running")
    for failure in failures:
        log.warning("%s", failure)
