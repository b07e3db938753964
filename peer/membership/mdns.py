"""Zero configuration at home: peers on one local network find each other by multicast DNS.

The libp2p specification (discovery/mdns.md): a service `_p2p._udp.local` whose instances have a random name and TXT
entries `dnsaddr=<full multiaddr>`. Ours carry one more entry that says which swarm they belong to, by a hash of its
name and key, and only the same join each other; others see a hash, and addresses that they can not use.

python-zeroconf talks; it keeps a thread of its own, from which what it hears is handed over to trio.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import trio

from petals.peer.base.concurrency import shielded_for
from petals.peer.net.host import Host
from petals.protocols.errors import SwarmError

if TYPE_CHECKING:
    from trio_typing import TaskStatus
    from zeroconf import Zeroconf

log = logging.getLogger(__name__)

SERVICE = "_p2p._udp.local."
TAG = "swarm="
ADDR = "dnsaddr="
MAX_ADDRS = 8
MAX_TEXT_BYTES = 4096
MAX_WAITING = 64
"""Found and not looked at yet; a flood of answers costs its sender's own swarm."""
RESOLVE_MS = 1500
CLOSE_S = 2.0


def swarm_tag(name: str, key: bytes = b"") -> str:
    """What peers of one swarm know each other by: says nothing of name and key."""
    return hashlib.sha256(b"/petals/lan/1\n" + name.encode() + b"\n" + key).hexdigest()[:32]


def write_text(addrs: Sequence[str], tag: str) -> bytes:
    """TXT entries: each a byte of length and so many bytes."""
    entries = [TAG + tag, *(ADDR + addr for addr in addrs[:MAX_ADDRS])]
    return b"".join(bytes([len(entry)]) + entry.encode() for entry in entries if len(entry) < 256)


def read_text(text: bytes, tag: str) -> tuple[str, ...]:
    """The addresses in TXT entries of our swarm; empty: they are another's, or make no sense."""
    entries, data = [], text[:MAX_TEXT_BYTES]
    while data:
        size = data[0]
        entries.append(data[1 : 1 + size].decode("utf-8", "replace"))
        data = data[1 + size :]
    if TAG + tag not in entries:
        return ()
    addrs = [entry.removeprefix(ADDR) for entry in entries if entry.startswith(ADDR)]
    return tuple(addrs[:MAX_ADDRS])


async def keep_meeting(
    host: Host, tag: str, *, met: Callable[[], None], task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Announce this host on the local network and connect to those of the same swarm, until cancelled. Where the
    network does no multicast it says so in the log, and waits.

    Args:
        met: called after each peer that was connected to.
    """
    heard_in, heard = trio.open_memory_channel[tuple[str, ...]](MAX_WAITING)
    token = trio.lowlevel.current_trio_token()

    def hear(addrs: tuple[str, ...]) -> None:  # in zeroconf's thread
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(partial(_offer, heard_in, addrs))

    with _talking() as zeroconf:
        task_status.started()
        if zeroconf is None:
            await trio.sleep_forever()
        assert zeroconf is not None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, _browse, zeroconf, tag, hear)
                nursery.start_soon(_announce, zeroconf, host, tag)
                async for addrs in heard:
                    if all(not addr.endswith(f"/p2p/{host.peer_id}") for addr in addrs):
                        nursery.start_soon(_meet, host, addrs, met)
        finally:
            with shielded_for(CLOSE_S):
                await trio.to_thread.run_sync(zeroconf.close)


def _offer(heard_in: trio.MemorySendChannel[tuple[str, ...]], addrs: tuple[str, ...]) -> None:
    with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
        heard_in.send_nowait(addrs)


async def _meet(host: Host, addrs: tuple[str, ...], met: Callable[[], None]) -> None:
    for addr in addrs:
        try:
            await host.connect(addr)
        except SwarmError as error:
            log.debug("a neighbour does not answer: %s", error)
            continue
        met()
        return


@contextmanager
def _talking() -> Iterator[Zeroconf | None]:
    from zeroconf import Zeroconf  # here: only peers that use it pay for the import

    try:
        zeroconf = Zeroconf()
    except OSError as error:
        log.info("no neighbours can be found here: %s", error)
        yield None
        return
    yield zeroconf


async def _announce(zeroconf: Zeroconf, host: Host, tag: str) -> None:
    from zeroconf import Error, ServiceInfo

    addrs = [addr for addr in host.addrs if "/127.0.0.1/" not in addr and "/::1/" not in addr and "circuit" not in addr]
    if not addrs:
        return
    name = secrets.token_hex(16)
    # Others need the addresses in the text only; zeroconf takes no instance for complete that has none of its own.
    ips = sorted({addr.split("/")[2] for addr in addrs if addr.startswith(("/ip4/", "/ip6/"))})
    info = ServiceInfo(
        SERVICE,
        f"{name}.{SERVICE}",
        port=host.port or 0,
        properties=write_text(addrs, tag),
        server=f"{name}.local.",
        parsed_addresses=ips,
    )
    with suppress(Error, OSError):
        await trio.to_thread.run_sync(zeroconf.register_service, info)


def _browse(zeroconf: Zeroconf, tag: str, hear: Callable[[tuple[str, ...]], None]) -> None:
    """Ask who is there, now and whenever somebody comes."""
    from zeroconf import ServiceBrowser, ServiceInfo, ServiceStateChange

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is not ServiceStateChange.Removed:
            info = ServiceInfo(service_type, name)
            info.request(zeroconf, RESOLVE_MS)  # whether or not it calls itself complete
            if addrs := read_text(info.text or b"", tag):
                hear(addrs)

    ServiceBrowser(zeroconf, SERVICE, handlers=[changed])
