"""Ways around routers, between real hosts on loopback. Real routers: tests/nat."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.peer.base.concurrency import together
from petals.peer.base.config import RelayLimits
from petals.peer.net.host import Host, HostConfig, open_host
from petals.peer.net.nat.relay import Relay
from petals.peer.net.wire import circuit
from petals.peer.net.wire.addresses import circuit_of, split_peer
from petals.peer.net.wire.pnet import SwarmKey
from petals.protocols.errors import PeerUnreachable, RemoteError, RequestRefused
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.types import PeerId
from tests.transport.conftest import LOOPBACK

ECHO = "/test/echo/1"
HIDDEN = HostConfig(listen=())


async def echo(stream: ByteStream) -> None:
    while piece := await stream.read(65536):
        await stream.write(piece)


async def ask(host: Host, peer_id: PeerId, data: bytes, addrs: tuple[str, ...] = ()) -> bytes:
    stream = await host.open_stream(peer_id, ECHO, addrs=addrs)

    async def read() -> bytes:
        return await MessageStream(stream, max_message_bytes=1).read_exactly(len(data))

    answer = await together(partial(stream.write, data), read)
    await stream.close()
    return answer


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - nobody tells when a connection appears
            await trio.sleep(0.005)


@asynccontextmanager
async def relayed(
    limits: RelayLimits | None = None,
    served: HostConfig = HIDDEN,
    asked: HostConfig = HIDDEN,
    middle: HostConfig = LOOPBACK,
) -> AsyncIterator[tuple[Host, Host, Host, Relay]]:
    """A client, a server that has a place at a relay, the relay."""
    async with (
        open_host(create_new_key_pair(), middle) as relay,
        open_host(create_new_key_pair(), served) as server,
        open_host(create_new_key_pair(), asked) as client,
    ):
        service = relay.traversal.start_relaying(limits or RelayLimits(), lambda: relay.addrs)
        server.set_handler(ECHO, echo)
        await server.connect(relay.addrs[0])
        assert await server.traversal.reserve(relay.peer_id) > 60
        yield client, server, relay, service


def fades(host: Host, peer_id: PeerId) -> bool:
    conn = host.traversal._network.live_conn(ID.from_base58(peer_id))
    return conn is None or conn.circuit is None or conn.circuit.is_fading


def through_relay(server: Host) -> tuple[str, ...]:
    ways = tuple(addr for addr in server.addrs if "p2p-circuit" in addr)
    assert ways
    return ways


async def test_a_server_that_listens_on_nothing_is_reached_through_a_relay() -> None:
    async with relayed() as (client, server, relay, service):
        ways = through_relay(server)
        assert ways == (f"{relay.addrs[0]}/p2p-circuit/p2p/{server.peer_id}",)
        payload = bytes(range(256)) * 4000
        with trio.fail_after(20):
            assert await ask(client, server.peer_id, payload, ways) == payload
        assert client.traversal.link(server.peer_id) == "relayed"
        assert client.traversal.link(relay.peer_id) == "direct"
        assert server.traversal.link(client.peer_id) == "relayed"
        assert service.circuits == 1
        assert service.passed_bytes > 2 * len(payload)
        await client.disconnect(server.peer_id)
        await until(lambda: service.circuits == 0)


async def test_who_has_no_place_is_not_reached() -> None:
    async with relayed() as (client, server, relay, _):
        (way,) = through_relay(server)
        stranger = way.replace(server.peer_id, client.peer_id)
        async with open_host(create_new_key_pair(), HIDDEN) as other:
            with pytest.raises(PeerUnreachable, match="NO_RESERVATION"):
                await other.connect(stranger)
        await server.disconnect(relay.peer_id)
        await until(lambda: not relay.is_connected(server.peer_id))
        with pytest.raises(PeerUnreachable, match="NO_RESERVATION"):
            await client.connect(way)


async def test_a_relay_that_is_none_and_one_that_is_full_say_so() -> None:
    async with relayed(RelayLimits(slots=1)) as (client, server, relay, service):
        await server.traversal.reserve(relay.peer_id)  # renewing needs no second slot
        assert service.places == 1
        await client.connect(relay.addrs[0])
        with pytest.raises(RequestRefused, match="RESERVATION_REFUSED"):
            await client.traversal.reserve(relay.peer_id)
        await client.connect(through_relay(server)[0])
        with pytest.raises(RequestRefused, match="does not speak"):
            await client.traversal.reserve(server.peer_id)


async def test_one_callers_circuits_are_limited() -> None:
    async with relayed(RelayLimits(circuits_per_peer=1)) as (client, server, relay, _):
        (way,) = through_relay(server)
        await client.connect(way)
        target = server.peer_id
        stream = await client.open_stream(relay.peer_id, circuit.HOP)
        parsed, peer = split_peer(way)
        assert str(peer) == target
        assert peer is not None
        with pytest.raises(RequestRefused, match="RESOURCE_LIMIT_EXCEEDED"):
            await circuit.connect(stream, peer, parsed)


async def test_a_circuit_ends_when_its_bytes_are_used_up_and_a_new_one_goes_on() -> None:
    async with relayed(RelayLimits(circuit_bytes=300_000)) as (client, server, _, service):
        ways = through_relay(server)
        with pytest.raises(RemoteError), trio.fail_after(20):
            await ask(client, server.peer_id, bytes(400_000), ways)
        await until(lambda: service.circuits == 0 and not client.is_connected(server.peer_id))
        assert await ask(client, server.peer_id, b"again", ways) == b"again"


async def test_a_circuit_that_fades_is_replaced_before_it_is_cut() -> None:
    async with relayed(RelayLimits(circuit_bytes=300_000)) as (client, server, _, service):
        ways = through_relay(server)
        await client.connect(ways[0])
        stream = await client.open_stream(server.peer_id, ECHO)
        reader = MessageStream(stream, max_message_bytes=1)
        for _ in range(4):
            await stream.write(bytes(32_000))
            await reader.read_exactly(32_000)
        await until(lambda: service.circuits == 2 and not fades(client, server.peer_id))
        assert await ask(client, server.peer_id, bytes(100_000)) == bytes(100_000)  # more than the first one had left
        await stream.write(b"still there")
        assert await reader.read_exactly(11) == b"still there"
        await stream.close()
        await until(lambda: service.circuits == 1)  # whoever has no stream any more is closed


async def test_a_relay_lets_no_more_through_than_its_rate() -> None:
    async with relayed(RelayLimits(bytes_per_s=1e6)) as (client, server, _, service):
        await client.connect(through_relay(server)[0])
        started = trio.current_time()
        await ask(client, server.peer_id, bytes(300_000))
        assert service.passed_bytes > 600_000  # there and back
        assert trio.current_time() - started > 0.45  # what the bucket had at first is a tenth of a second's worth


async def test_nobody_is_called_through_a_relay_where_no_place_was_taken() -> None:
    async with relayed() as (client, server, relay, _):
        await relay.traversal._streams.open_stream(server.peer_id, circuit.STOP)
        server.traversal.leave(relay.peer_id)
        assert not [addr for addr in server.addrs if "circuit" in addr]
        with pytest.raises(PeerUnreachable, match="CONNECTION_FAILED"):
            await client.connect(f"{relay.addrs[0]}/p2p-circuit/p2p/{server.peer_id}")


async def test_two_that_met_over_a_relay_get_a_connection_of_their_own() -> None:
    # On one machine there is no router to be punched through, but both ends dial from their listening ports at the
    # same moment all the same, and must agree on who is the client.
    async with relayed(served=LOOPBACK, asked=LOOPBACK) as (client, server, _, service):
        (way,) = through_relay(server)
        await client.connect(way)
        await until(lambda: client.traversal.link(server.peer_id) == "punched")
        await until(lambda: server.traversal.link(client.peer_id) == "punched")
        assert await ask(client, server.peer_id, b"directly") == b"directly"
        await until(lambda: service.circuits == 0)
        assert await ask(client, server.peer_id, b"alone") == b"alone"


async def test_a_private_swarm_has_ways_around_routers_too() -> None:
    private = replace(LOOPBACK, swarm_key=SwarmKey(bytes(range(32))))
    async with relayed(served=private, asked=private, middle=private) as (client, server, relay, _):
        assert await server.traversal.ask_dial_back(relay.peer_id, server.addrs)
        await client.connect(through_relay(server)[0])
        assert client.link(server.peer_id) == "relayed"
        assert await ask(client, server.peer_id, b"ciphered twice") == b"ciphered twice"
        await until(lambda: client.link(server.peer_id) == "punched")
        assert await ask(client, server.peer_id, b"directly") == b"directly"


async def test_a_dial_back_tells_an_open_door_from_a_wall() -> None:
    async with (
        open_host(create_new_key_pair(), LOOPBACK) as helper,
        open_host(create_new_key_pair(), LOOPBACK) as asker,
    ):
        await asker.connect(helper.addrs[0])
        assert await asker.traversal.ask_dial_back(helper.peer_id, asker.addrs)
        nobody = "/ip4/127.0.0.1/tcp/1"
        assert not await asker.traversal.ask_dial_back(helper.peer_id, [nobody])
        assert not await asker.traversal.ask_dial_back(helper.peer_id, [helper.addrs[0]])  # somebody else's
        elsewhere = asker.addrs[0].replace("127.0.0.1", "127.0.0.2")  # this machine, too, but not where we come from
        assert not await asker.traversal.ask_dial_back(helper.peer_id, [elsewhere])
        assert await asker.traversal.ask_dial_back(helper.peer_id, [nobody, asker.addrs[0]])


def test_addresses_through_relays_are_taken_apart() -> None:
    relay, peer = (
        "12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    )
    text = f"/ip4/1.2.3.4/tcp/5/p2p/{relay}/p2p-circuit/p2p/{peer}"
    where, who = split_peer(text)
    assert str(where) == f"/ip4/1.2.3.4/tcp/5/p2p/{relay}/p2p-circuit"
    assert str(who) == peer
    way = circuit_of(where)
    assert way is not None
    assert (str(way.relay), str(way.relay_addr)) == (relay, "/ip4/1.2.3.4/tcp/5")
    assert circuit_of(Multiaddr("/ip4/1.2.3.4/tcp/5")) is None
    assert split_peer(str(where)) == (where, None)
