"""Joining a swarm: a host, at least one initial peer that answers, the directory, and a nursery for the rest."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

import trio

from petals.dht.directory import Directory, open_directory
from petals.peer.base.concurrency import gather
from petals.peer.base.config import LanConfig
from petals.peer.base.identity import Identity, verify
from petals.peer.membership.contacts import Contacts, without_itself
from petals.peer.membership.mdns import keep_meeting, swarm_tag
from petals.peer.membership.record_exchange import fetch_record
from petals.peer.net.host import Host, HostConfig, open_host
from petals.protocols.errors import PeerUnreachable, SwarmError, UserError

log = logging.getLogger(__name__)


class Membership(NamedTuple):
    """A node of the swarm."""

    host: Host
    directory: Directory
    nursery: trio.Nursery
    contacts: Contacts


async def join(host: Host, addrs: Sequence[str]) -> PeerUnreachable | None:
    """Connect to all of `addrs` at once.

    Returns: the first failure, when nobody answered.

    Raises:
        UserError: an address that is none; names it.
    """
    if not addrs:
        return None
    results = await gather([partial(host.connect, addr) for addr in addrs])
    failures = [result for result in results if isinstance(result, SwarmError)]
    away: list[PeerUnreachable] = []
    for failure in failures:
        if not isinstance(failure, PeerUnreachable):
            raise failure
        away.append(failure)
    if len(away) == len(addrs):
        return away[0]
    for failure in away:
        log.warning("%s", failure)
    return None


@asynccontextmanager
async def open_membership(
    identity: Identity,
    settings: HostConfig,
    initial_peers: Sequence[str],
    lan: LanConfig | None = None,
    *,
    hear: Callable[[Sequence[bytes]], Awaitable[object]] | None = None,
    wait: bool = False,
    progress: Callable[[str], None] = log.info,
) -> AsyncIterator[Membership]:
    """Be a node of the swarm until the context is left, which also cancels what was started in the nursery.

    Args:
        hear: told of complaints that other peers pass on.
        wait: for an initial peer when none answers, however long that takes.
        progress: reports such waits, and initial peers that are lost or back, in one line each.

    What the body raises comes out as it was raised, not wrapped into the nurseries' groups.

    Raises:
        UserError: a port in use, an initial peer that can not be reached, nobody on the local network.
    """
    raised: Exception | None = None
    async with open_host(identity.key_pair, settings) as host:
        others = without_itself(host, initial_peers)
        failure = await join(host, others)
        if failure is not None:
            if not wait:
                raise UserError(f"no initial peer answers: {failure}; check the address and that the peer is running")
            progress(f"no initial peer answers ({failure}); waiting until one does")
        contacts = Contacts(host, others, progress)
        fetch_direct = partial(fetch_record, host, hear=hear)
        async with (
            open_directory(host, identity, verify, fetch_direct=fetch_direct) as directory,
            trio.open_nursery() as nursery,
        ):
            try:
                if lan is not None:
                    key = b"" if settings.swarm_key is None else settings.swarm_key.fingerprint.encode()
                    await _join_neighbours(host, nursery, lan, swarm_tag(lan.swarm, key))
                nursery.start_soon(contacts.run)
                if failure is not None:
                    await contacts.somebody()
                    progress("joined the swarm")
                yield Membership(host, directory, nursery, contacts)
            except Exception as error:  # kept, not handled: raised again below
                raised = error
            nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised


async def _join_neighbours(host: Host, nursery: trio.Nursery, lan: LanConfig, tag: str) -> None:
    somebody = trio.Event()
    await nursery.start(partial(keep_meeting, host, tag, met=somebody.set))
    with trio.move_on_after(lan.search_s):
        await somebody.wait()
    if lan.required and not somebody.is_set() and not host.connected_peers():
        raise UserError(
            "nobody to ask: no peer of this swarm answers on the local network; give --initial_peers ADDR, or hold the "
            "blocks here with --serve"
        )
