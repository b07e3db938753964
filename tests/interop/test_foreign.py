"""Our transport against js-libp2p and go-libp2p: dialling and being dialled."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair

from petals.peer.base.config import RelayLimits
from petals.peer.net.host import Host, HostConfig, open_host
from petals.peer.net.wire.pnet import SwarmKey, encode_swarm_key
from petals.protocols.errors import PeerUnreachable
from petals.protocols.stream import ByteStream
from petals.protocols.types import PeerId
from tests.interop.foreign import ECHO, MIB, RESET, go_peer, js_peer

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]
Dial = Callable[[str, str], Awaitable[object]]


async def echo(stream: ByteStream) -> None:
    while piece := await stream.read(65536):
        await stream.write(piece)


async def reset(stream: ByteStream) -> None:
    await stream.read(1)
    await stream.reset()


@asynccontextmanager
async def meeting(
    kind: str, folder: Path, *, ours: SwarmKey | None = None, theirs: SwarmKey | None = None
) -> AsyncIterator[tuple[Host, str, Dial]]:
    """Our host, the foreign peer's address, and a way to have it dial; each with a swarm key, where one is given."""
    # A foreign listener with another key may take our first words for a short line, and wait for the rest of it.
    connect_s = 2.0 if ours != theirs and ours is not None else 5.0
    config = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), swarm_key=ours, connect_s=connect_s)
    async with AsyncExitStack() as stack:
        if kind == "js":
            addr, dial = await stack.enter_async_context(js_peer(encode_swarm_key(theirs) if theirs else b""))
        else:
            addr, go = await stack.enter_async_context(go_peer(folder))
            dial = go.dial
        host = await stack.enter_async_context(open_host(create_new_key_pair(), config))
        host.set_handler(ECHO, echo)
        host.set_handler(RESET, reset)
        with trio.fail_after(240):
            yield host, addr, dial


@pytest.mark.parametrize("kind", ["js", "go"])
async def test_they_dial_us(kind: str, tmp_path: Path) -> None:
    async with meeting(kind, tmp_path) as (host, _, dial):
        for command in ("ping", "echo", "many", "reset", "ping"):
            assert await dial(command, host.addrs[0]) is True, command


@pytest.mark.parametrize("kind", ["js", "go"])
async def test_we_dial_them(kind: str, tmp_path: Path) -> None:
    async with meeting(kind, tmp_path) as (host, addr, _):
        peer_id = await host.connect(addr)
        assert await host.ping(peer_id) > 0
        half_close = kind != "go"  # the daemon that drives go ends both directions when one ends
        await ask(host, peer_id, 16 * MIB, half_close)
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(ask, host, peer_id, 50_000, half_close)
        stream = await host.open_stream(peer_id, RESET)
        await stream.write(b"x")
        assert await end_of(stream) == ("ended" if kind == "go" else "reset")
        assert await host.ping(peer_id) > 0


LOOPBACK, HIDDEN = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",)), HostConfig(listen=())


@asynccontextmanager
async def behind_a_relay() -> AsyncIterator[tuple[Host, Host]]:
    """A relay of ours, and a peer of ours that can be called through it only."""
    async with open_host(create_new_key_pair(), LOOPBACK) as relay, open_host(create_new_key_pair(), HIDDEN) as hidden:
        relay.traversal.start_relaying(RelayLimits(), lambda: relay.addrs)
        hidden.set_handler(ECHO, echo)
        await hidden.connect(relay.addrs[0])
        await hidden.traversal.reserve(relay.peer_id)
        yield relay, hidden


async def test_js_is_called_through_our_relay_and_calls() -> None:
    async with behind_a_relay() as (relay, hidden):
        with trio.fail_after(120):
            async with js_peer(relay=relay.addrs[0]) as (addr, dial):
                assert addr.startswith(f"{relay.addrs[0]}/p2p-circuit/p2p/")
                peer_id = await hidden.connect(addr)
                assert hidden.link(peer_id) == "relayed"
                await ask(hidden, peer_id, 4 * MIB, True)
                await hidden.disconnect(peer_id)
                assert await dial("echo", hidden.addrs[0]) is True


async def test_we_are_called_through_a_relay_of_js() -> None:
    with trio.fail_after(120):
        async with (
            js_peer(relay="none") as (addr, _),
            open_host(create_new_key_pair(), HIDDEN) as server,
            open_host(create_new_key_pair(), HIDDEN) as client,
        ):
            server.set_handler(ECHO, echo)
            relay = await server.connect(addr)
            await server.traversal.reserve(relay, [addr])
            (way,) = server.addrs
            await client.connect(way)
            assert client.link(server.peer_id) == "relayed"
            await ask(client, server.peer_id, 20_000, True)  # js lets 128 KiB through


async def test_go_calls_through_our_relay(tmp_path: Path) -> None:
    async with behind_a_relay() as (_, hidden):
        with trio.fail_after(120):
            async with go_peer(tmp_path, "-relay=true") as (_, go):
                assert await go.ask(hidden.addrs[0], 4 * MIB) is True


async def test_go_is_called_through_our_relay(tmp_path: Path) -> None:
    """It takes itself for private, and reserves a place by itself."""
    async with open_host(create_new_key_pair(), LOOPBACK) as relay, open_host(create_new_key_pair(), HIDDEN) as client:
        relay.traversal.start_relaying(RelayLimits(), lambda: relay.addrs)
        (at,) = relay.addrs
        flags = ("-relay=true", "-dht", "-b", f"-bootstrapPeers={at}", "-forceReachabilityPrivate")
        flags += ("-autoRelay", "-relayDiscovery=false", f"-trustedRelays={at}")
        with trio.fail_after(120):
            async with go_peer(tmp_path, *flags) as (addr, _):
                peer_id = PeerId(addr.rpartition("/")[2])
                while peer_id not in relay.traversal.relay._places:  # noqa: ASYNC110 - another process asks for it
                    await trio.sleep(0.01)
                await client.connect(f"{at}/p2p-circuit/p2p/{peer_id}")
                assert client.link(peer_id) == "relayed"
                await ask(client, peer_id, 4 * MIB, False)


async def test_we_are_called_through_a_relay_of_go(tmp_path: Path) -> None:
    flags = ("-relay=true", "-relayService=true", f"-relayBufferSize={MIB}", "-forceReachabilityPublic")
    with trio.fail_after(120):
        async with (
            go_peer(tmp_path, *flags) as (addr, _),
            open_host(create_new_key_pair(), HIDDEN) as server,
            open_host(create_new_key_pair(), HIDDEN) as client,
        ):
            server.set_handler(ECHO, echo)
            relay = await server.connect(addr)
            await server.traversal.reserve(relay, [addr])
            (way,) = server.addrs
            await client.connect(way)
            assert client.link(server.peer_id) == "relayed"
            await ask(client, server.peer_id, 20_000, True)  # in some runs the daemon lets 128 KiB through, as go does


KEY, OTHER = SwarmKey(bytes(range(32))), SwarmKey(bytes(range(1, 33)))


async def test_a_private_network_with_js() -> None:
    """Their pnet is the specification's, and so is ours."""
    async with meeting("js", Path(), ours=KEY, theirs=KEY) as (host, addr, dial):
        for command in ("ping", "echo", "many", "reset"):
            assert await dial(command, host.addrs[0]) is True, command
        peer_id = await host.connect(addr)
        await ask(host, peer_id, 16 * MIB, half_close=True)


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [("js", KEY, OTHER), ("js", KEY, None), ("js", None, KEY), ("go", KEY, None)],  # go's daemon takes no key
    ids=["js has another", "js has none", "js has one, we none", "go has none"],
)
async def test_strangers_to_a_private_network(
    kind: str, ours: SwarmKey | None, theirs: SwarmKey | None, tmp_path: Path
) -> None:
    async with meeting(kind, tmp_path, ours=ours, theirs=theirs) as (host, addr, dial):
        with pytest.raises(PeerUnreachable, match=r"swarm.key"):
            await host.connect(addr)
        try:
            answer = await dial("ping", host.addrs[0])
        except AssertionError as error:  # the daemon's way of saying no
            answer = str(error)
        assert answer is not True
        assert host.connected_peers() == ()


async def end_of(stream: ByteStream) -> str:
    try:
        while await stream.read(1000):
            pass
    except PeerUnreachable:
        return "reset"
    return "ended"


async def ask(host: Host, peer_id: PeerId, size: int, half_close: bool) -> None:
    """Out and back; with `half_close`, the end of one direction before the other."""
    stream = await host.open_stream(peer_id, ECHO)
    data, answer = os.urandom(size), bytearray()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await stream.write(data)
            if half_close:
                await stream.close_write()

        while len(answer) < size and (piece := await stream.read(MIB)):
            answer += piece
        if half_close:
            assert await stream.read(1) == b""
    assert answer == data
    await stream.close()


@pytest.mark.stock
@pytest.mark.parametrize(("dialler", "listener"), [("petals", "stock"), ("stock", "petals")])
async def test_the_stock_stack_and_ours(dialler: str, listener: str) -> None:
    loopback = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
    async with (
        open_host(create_new_key_pair(), replace(loopback, transport=listener)) as server,  # type: ignore[arg-type]
        open_host(create_new_key_pair(), replace(loopback, transport=dialler)) as client,  # type: ignore[arg-type]
    ):
        for one, other in ((client, server), (server, client)):
            other.set_handler(ECHO, echo)
            other.set_handler(RESET, reset)
            await one.connect_peer(other.peer_id, other.addrs)
            assert await one.ping(other.peer_id) > 0
            await ask(one, other.peer_id, 16 * MIB, half_close=True)
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(ask, one, other.peer_id, 50_000, True)
            stream = await one.open_stream(other.peer_id, RESET)
            await stream.write(b"x")
            assert await end_of(stream) in ("ended", "reset")  # on the stock stack a reset reads like an end
            assert await one.ping(other.peer_id) > 0
        assert len(client.connected_peers()) == 1
