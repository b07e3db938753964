"""Nobody makes us dial third parties: which addresses are dialled, who may name them, how often."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.peer.net.host import open_host
from petals.peer.net.nat import dcutr
from petals.peer.net.wire.dial_policy import (
    ALL_PUNCHES_BURST,
    FAILURES_BURST,
    FAILURES_PER_S,
    PUNCH_ADDRS,
    PUNCH_DIALS,
    PUNCHES_BURST,
    DialPolicy,
    Reach,
    reach_of,
)
from petals.protocols.errors import PeerUnreachable
from petals.protocols.stream import MessageStream
from petals.protocols.types import PeerId
from tests.transport.conftest import LOOPBACK

SOMEBODY = PeerId(str(ID.from_pubkey(create_new_key_pair().public_key)))


@pytest.mark.parametrize(
    ("ip", "reach"),
    [
        ("127.0.0.1", Reach.MACHINE),
        ("127.8.8.8", Reach.MACHINE),
        ("::1", Reach.MACHINE),
        ("::ffff:127.0.0.1", Reach.MACHINE),
        ("10.1.2.3", Reach.NETWORK),
        ("192.168.0.1", Reach.NETWORK),
        ("100.64.1.1", Reach.NETWORK),
        ("169.254.169.254", Reach.NETWORK),
        ("fe80::1%eth0", Reach.NETWORK),
        ("fd00::1", Reach.NETWORK),
        ("::ffff:10.0.0.1", Reach.NETWORK),
        ("2002:0a00:0001::1", Reach.NETWORK),
        ("8.8.8.8", Reach.INTERNET),
        ("2600::1", Reach.INTERNET),
        ("0.0.0.0", Reach.NOWHERE),
        ("224.0.0.1", Reach.NOWHERE),
        ("255.255.255.255", Reach.NOWHERE),
        ("64:ff9b::a00:1", Reach.NOWHERE),
        ("nonsense", Reach.NOWHERE),
    ],
)
def test_reach(ip: str, reach: Reach) -> None:
    assert reach_of(ip) is reach


NAMED = [
    "/ip4/127.0.0.1/tcp/1",
    "/ip4/10.0.0.1/tcp/1",
    "/ip4/8.8.8.8/tcp/1",
    f"/ip4/10.0.0.1/tcp/1/p2p/{SOMEBODY}/p2p-circuit",
]


def test_who_may_name_what() -> None:
    policy = DialPolicy(list, lambda: 0.0)
    assert policy.plausible(NAMED, "8.8.4.4") == NAMED[2:3]
    assert policy.plausible(NAMED, "192.168.1.1") == NAMED[1:]
    assert policy.plausible(NAMED, "127.0.0.1") == NAMED
    assert policy.plausible(["/ip4/224.0.0.1/tcp/1"], "127.0.0.1") == []
    assert policy.plausible(NAMED, None) == NAMED, "nobody but the user has said anything yet"


def test_a_peer_of_the_internet_dials_nobody_at_home() -> None:
    policy = DialPolicy(lambda: ["8.8.8.8", "9.9.9.9"], lambda: 0.0)
    assert policy.objection("8.8.4.4") is None
    assert policy.objection("127.0.0.1") == "an address of another network"
    assert policy.objection("169.254.169.254") == "an address of another network"
    assert policy.plausible(NAMED, None) == NAMED[2:3]
    policy.trust(["/ip4/192.168.1.9/tcp/1/p2p/" + SOMEBODY])
    assert policy.objection("192.168.1.9") is None, "the user has said it"


def test_a_third_party_is_dialled_a_few_times_whoever_names_it() -> None:
    now = 0.0
    policy = DialPolicy(lambda: ["8.8.8.8"], lambda: now)
    dialled = 0
    for _ in range(1000):
        if policy.objection("9.9.9.9") is None:
            dialled += 1
            policy.failed("9.9.9.9")
    assert dialled == FAILURES_BURST
    assert policy.objection("9.9.9.10") is None, "others are dialled"
    now += 1 / FAILURES_PER_S
    assert policy.objection("9.9.9.9") is None
    policy.trust(["/ip4/9.9.9.9/tcp/1"])
    for _ in range(100):
        policy.failed("9.9.9.9")
    assert policy.objection("9.9.9.9") is None


def test_holes_are_punched_at_a_rate() -> None:
    policy = DialPolicy(list, lambda: 0.0)
    assert sum(policy.may_punch("one") for _ in range(100)) == PUNCHES_BURST
    assert sum(policy.may_punch(str(index)) for index in range(1000)) == ALL_PUNCHES_BURST - PUNCHES_BURST


@asynccontextmanager
async def victim() -> AsyncIterator[tuple[int, list[object]]]:
    """Somebody who has nothing to do with it, and who accepts whatever comes: its port, and its connections."""
    met: list[object] = []

    async def accept(stream: trio.SocketStream) -> None:
        met.append(stream)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, accept, [listener])
        yield listener.socket.getsockname()[1], met
        nursery.cancel_scope.cancel()


async def test_one_call_over_a_direct_connection_punches_nothing() -> None:
    """51 connections to an address of the caller's choice, before: hole punching is for circuits."""
    async with (
        victim() as (port, met),
        open_host(create_new_key_pair(), LOOPBACK) as host,
        open_host(create_new_key_pair(), replace(LOOPBACK, listen=())) as stranger,
    ):
        await stranger.connect(host.addrs[0])
        stream = await stranger.open_stream(host.peer_id, dcutr.DCUTR)
        messages = MessageStream(stream, max_message_bytes=dcutr.MAX_MESSAGE_BYTES)
        with trio.move_on_after(2):
            await dcutr.begin(messages, [f"/ip4/127.0.0.1/tcp/{port}"])
            await stream.read(1)
        assert not met


async def test_a_punch_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """At few addresses, after few dials each."""
    dials: list[tuple[str, int]] = []

    async def refuse(_: int, host: str, port: int) -> Any:
        dials.append((host, port))
        raise OSError("refused")

    monkeypatch.setattr("petals.peer.net.libp2p.swarm._open_tcp_from", refuse)
    monkeypatch.setattr("petals.peer.net.libp2p.swarm._PUNCH_AGAIN_S", 0.0)
    async with open_host(create_new_key_pair(), LOOPBACK) as host:
        addrs = [Multiaddr(f"/ip4/8.8.8.{index}/tcp/443") for index in range(20)]
        network = host._network
        await network.punch(ID.from_base58(SOMEBODY), addrs, 4001, is_client=True, within_s=5)
    assert len(dials) == PUNCH_ADDRS * PUNCH_DIALS


async def test_addresses_of_others_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that talks to the Internet only: whatever is said of a peer, only the Internet is dialled."""
    opened: list[str] = []

    async def open_nothing(host: str, port: int) -> Any:
        opened.append(host)
        raise OSError("nobody there")

    async with open_host(create_new_key_pair(), replace(LOOPBACK, listen=())) as host:
        monkeypatch.setattr(host._network.policy, "_seen_ips", lambda: ["8.8.8.8"])
        monkeypatch.setattr("petals.peer.net.libp2p.swarm.trio.open_tcp_stream", open_nothing)
        for number in range(20):
            peer = PeerId(str(ID.from_pubkey(create_new_key_pair().public_key)))
            addrs = ["/ip4/127.0.0.1/tcp/22", "/ip4/192.168.0.1/tcp/80", f"/ip4/9.9.9.9/tcp/{number + 1}"]
            with pytest.raises(PeerUnreachable):
                await host.connect_peer(peer, [*addrs, "/dns4/localhost/tcp/25"])
    assert opened == ["9.9.9.9"] * FAILURES_BURST


async def test_what_a_stranger_says_of_itself_and_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Identify's addresses and those of the directory's answers are cut to what their speaker may name."""
    async with (
        open_host(create_new_key_pair(), LOOPBACK) as host,
        open_host(create_new_key_pair(), replace(LOOPBACK, listen=())) as other,
    ):
        await other.connect(host.addrs[0])
        assert host.plausible(other.peer_id, NAMED) == tuple(NAMED)
        speaker = ID.from_base58(other.peer_id)
        monkeypatch.setattr(host._network, "ip_of_peer", lambda _: "8.8.4.4")
        assert host.plausible(other.peer_id, NAMED) == (NAMED[2],)
        host.libp2p.get_peerstore().clear_addrs(speaker)
        host.libp2p.get_peerstore().add_addrs(speaker, [Multiaddr(addr) for addr in NAMED], 60)
        assert [str(addr) for addr in host.libp2p.get_peerstore().addrs(speaker)] == [NAMED[2]]
