"""The host on loopback: addresses, dialling, handlers, frozen and killed peers, strangers, and what is left behind."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from trio.testing import wait_all_tasks_blocked

from petals.peer.net.host import PING, PING_BYTES, Host, HostConfig, open_host
from petals.peer.net.libp2p.swarm import LibraryConn
from petals.peer.net.wire.multistream import MULTISTREAM, encode_line, proposal
from petals.protocols.errors import PeerUnreachable, RemoteProtocolError, RequestRefused, UserError
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.types import PeerId
from tests.transport.conftest import LOOPBACK, meet, two_hosts

ECHO = "/test/echo/1"


async def echo(stream: ByteStream) -> None:
    while piece := await stream.read(65536):
        await stream.write(piece)


async def ask(host: Host, peer_id: PeerId, data: bytes, addrs: tuple[str, ...] = ()) -> bytes:
    stream = await host.open_stream(peer_id, ECHO, addrs=addrs)
    await stream.write(data)
    answer = await MessageStream(stream, max_message_bytes=1).read_exactly(len(data))
    await stream.close()
    return answer


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - the library has no event for it
            await trio.sleep(0.005)


def loud(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What we said at WARNING or above; the library complains of every identify that a goodbye cuts short."""
    return [record for record in caplog.records if record.levelno >= logging.WARNING and "libp2p" not in record.name]


# -- addresses -------------------------------------------------------------------------------------------------------


async def test_addresses_are_full_resolved_and_usable() -> None:
    async with (
        open_host(create_new_key_pair(), HostConfig(listen=("/ip4/0.0.0.0/tcp/0", "/ip6/::1/tcp/0"))) as server,
        open_host(create_new_key_pair(), HostConfig(listen=())) as client,
    ):
        assert client.addrs == ()
        assert all(addr.endswith(f"/p2p/{server.peer_id}") for addr in server.addrs)
        assert not any("/0.0.0.0/" in addr or "/tcp/0" in addr for addr in server.addrs)
        assert any(addr.startswith("/ip4/127.0.0.1/") for addr in server.addrs)
        server.set_handler(ECHO, echo)
        for addr in server.addrs:
            assert await client.connect(addr) == server.peer_id
            assert await ask(client, server.peer_id, b"hello") == b"hello"
            await client.disconnect(server.peer_id)
            assert not client.is_connected(server.peer_id)


async def test_announced_addresses_replace_those_listened_on() -> None:
    config = replace(LOOPBACK, announce=("/dns4/example.org/tcp/4001",))
    async with open_host(create_new_key_pair(), config) as host:
        assert host.addrs == (f"/dns4/example.org/tcp/4001/p2p/{host.peer_id}",)


@pytest.mark.parametrize("addr", ["/ip4/127.0.0.1/udp/0/quic-v1", "127.0.0.1:80", "/ip4/192.0.2.77/tcp/0", ""])
async def test_addresses_that_cannot_be_listened_on_are_the_users_mistake(addr: str) -> None:
    with pytest.raises(UserError, match="cannot listen on"):
        async with open_host(create_new_key_pair(), HostConfig(listen=(addr,))):
            pass


async def test_a_port_in_use_is_the_users_mistake_and_frees_the_other_doors() -> None:
    async with open_host(create_new_key_pair(), LOOPBACK) as first:
        taken = first.addrs[0].split("/p2p/")[0]
        free = LOOPBACK.listen[0]
        with pytest.raises(UserError, match="in use"):
            async with open_host(create_new_key_pair(), HostConfig(listen=(free, taken))):
                pass


@pytest.mark.parametrize("addr", ["/ip4/127.0.0.1/tcp/1", "nonsense", "/ip4/127.0.0.1/tcp/1/p2p/nonsense"])
async def test_an_address_without_a_peer_is_the_users_mistake(addr: str) -> None:
    async with open_host(create_new_key_pair(), HostConfig(listen=())) as host:
        with pytest.raises(UserError, match="full address"):
            await host.connect(addr)


# -- dialling --------------------------------------------------------------------------------------------------------


async def test_a_refused_dial_says_so_and_the_next_one_works_at_once() -> None:
    keys = create_new_key_pair()
    async with open_host(create_new_key_pair(), HostConfig(listen=())) as client:
        async with open_host(keys, LOOPBACK) as server:
            addr, peer_id = server.addrs[0], server.peer_id
        with pytest.raises(PeerUnreachable, match="refused") as caught:
            await client.connect(addr)
        assert caught.value.peer_id == peer_id
        again = HostConfig(listen=(addr.split("/p2p/")[0],))
        async with open_host(keys, again) as server:
            server.set_handler(ECHO, echo)
            assert await ask(client, peer_id, b"back again") == b"back again"  # by the address it remembers


async def test_one_good_address_among_bad_ones_is_enough() -> None:
    async with (
        open_host(create_new_key_pair(), LOOPBACK) as server,
        open_host(create_new_key_pair(), LOOPBACK) as other,
        open_host(create_new_key_pair(), HostConfig(listen=())) as client,
    ):
        somebody_else = other.addrs[0].split("/p2p/")[0]
        addrs = ("/ip4/127.0.0.1/tcp/1", somebody_else, "/ip4/1.2.3.4/udp/9/quic-v1", "nonsense", server.addrs[0])
        await client.connect_peer(server.peer_id, addrs)
        assert client.connected_peers() == (server.peer_id,)
        await client.connect_peer(server.peer_id, ())  # at once, since it is connected


async def test_somebody_else_at_the_address_is_refused() -> None:
    async with (
        open_host(create_new_key_pair(), LOOPBACK) as server,
        open_host(create_new_key_pair(), HostConfig(listen=())) as client,
    ):
        stranger = client.peer_id
        with pytest.raises(PeerUnreachable, match="peer id"):
            await server.connect_peer(PeerId(stranger[:-1] + "x" if stranger[-1] != "x" else stranger), server.addrs)


async def test_a_dial_nobody_answers_is_bounded_and_shared() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")  # accepts, never speaks
    port = listener.socket.getsockname()[1]
    silent = PeerId("12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5")
    async with open_host(create_new_key_pair(), HostConfig(listen=(), connect_s=0.3)) as client:
        n_failed = 0

        async def dial() -> None:
            nonlocal n_failed
            with pytest.raises(PeerUnreachable, match="no answer in"):
                await client.connect_peer(silent, [f"/ip4/127.0.0.1/tcp/{port}"])
            n_failed += 1

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(dial)
        assert n_failed == 20
    await listener.aclose()


async def test_a_dial_goes_on_when_who_wanted_it_has_given_up() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    async with (
        open_host(create_new_key_pair(), LOOPBACK) as server,
        open_host(create_new_key_pair(), HostConfig(listen=())) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(client.connect_peer, server.peer_id, [f"/ip4/127.0.0.1/tcp/{port}"])
        called = await listener.accept()  # the call is under way, and slow: nobody says a word yet
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            ip, real_port = server.addrs[0].split("/")[2::2][:2]
            async with called, await trio.open_tcp_stream(ip, int(real_port)) as onward, trio.open_nursery() as pipes:
                pipes.start_soon(pump, called, onward)
                pipes.start_soon(pump, onward, called)
                await until(lambda: client.connected_peers() == (server.peer_id,))
                pipes.cancel_scope.cancel()
    await listener.aclose()


async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    async for piece in source:
        await sink.send_all(piece)


async def test_a_dial_with_other_addresses_does_not_take_the_first_ones_failure() -> None:
    async with (
        open_host(create_new_key_pair(), LOOPBACK) as server,
        open_host(create_new_key_pair(), HostConfig(listen=(), connect_s=0.3)) as client,
    ):
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")  # accepts, never speaks
        port = listener.socket.getsockname()[1]
        with trio.move_on_after(0):
            await client.connect_peer(server.peer_id, [f"/ip4/127.0.0.1/tcp/{port}"])
        await client.connect_peer(server.peer_id, server.addrs)
        assert client.connected_peers() == (server.peer_id,)
        await listener.aclose()


async def test_two_peers_that_dial_each_other_at_once_both_succeed() -> None:
    async with open_host(create_new_key_pair(), LOOPBACK) as one, open_host(create_new_key_pair(), LOOPBACK) as two:
        one.set_handler(ECHO, echo)
        two.set_handler(ECHO, echo)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.connect, two.addrs[0])
            nursery.start_soon(two.connect, one.addrs[0])
        assert await ask(one, two.peer_id, b"one") == b"one"
        assert await ask(two, one.peer_id, b"two") == b"two"


async def test_both_ends_hear_of_a_new_peer() -> None:
    seen: list[PeerId] = []
    async with open_host(create_new_key_pair(), LOOPBACK) as one, open_host(create_new_key_pair(), LOOPBACK) as two:
        one.on_peer(seen.append)
        two.on_peer(seen.append)
        await one.connect(two.addrs[0])
        await until(lambda: len(seen) == 2)
        assert set(seen) == {one.peer_id, two.peer_id}


# -- streams and handlers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["petals", pytest.param("stock", marks=pytest.mark.stock)])
async def test_pings_and_refusals(transport: str) -> None:
    async with two_hosts(replace(LOOPBACK, transport=transport)) as (client, server):
        assert await client.ping(server.peer_id) > 0
        assert await server.ping(client.peer_id) > 0
        with pytest.raises(RequestRefused, match="/nobody/speaks/this") as caught:
            await client.open_stream(server.peer_id, "/nobody/speaks/this")
        assert caught.value.peer_id == server.peer_id
        server.set_handler(ECHO, echo)
        assert await ask(client, server.peer_id, b"fine") == b"fine"


async def test_a_protocol_taken_for_granted_and_gone_is_refused_at_the_first_read() -> None:
    async with two_hosts() as (client, server):
        server.set_handler(ECHO, echo)
        assert await ask(client, server.peer_id, b"first") == b"first"
        server.remove_handler(ECHO)
        stream = await client.open_stream(server.peer_id, ECHO)
        with pytest.raises((RequestRefused, PeerUnreachable)):
            await stream.read(1)


async def test_a_handler_that_crashes_costs_one_stream(caplog: pytest.LogCaptureFixture) -> None:
    async def crash(stream: ByteStream) -> None:
        await stream.read(1)
        raise ZeroDivisionError("a bug")

    async with two_hosts() as (client, server):
        server.set_handler("/test/crash/1", crash)
        server.set_handler(ECHO, echo)
        stream = await client.open_stream(server.peer_id, "/test/crash/1")
        await stream.write(b"x")
        with pytest.raises(PeerUnreachable):
            await stream.read(1)
        assert await ask(client, server.peer_id, b"alive") == b"alive"
    (record,) = loud(caplog)
    assert record.exc_info is not None


async def test_a_handler_that_ends_for_a_peers_fault_logs_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def blame(stream: ByteStream) -> None:
        await stream.read(1)
        raise PeerUnreachable("it went away", stream.remote_peer)

    async with two_hosts() as (client, server):
        server.set_handler("/test/blame/1", blame)
        stream = await client.open_stream(server.peer_id, "/test/blame/1")
        await stream.write(b"x")
        with pytest.raises(PeerUnreachable):
            await stream.read(1)
    assert not loud(caplog)


async def test_the_last_words_of_a_handler_that_returns_arrive() -> None:
    async def speak(stream: ByteStream) -> None:
        await stream.write(bytes(1 << 20))

    async with two_hosts() as (client, server):
        server.set_handler("/test/speak/1", speak)
        stream = await client.open_stream(server.peer_id, "/test/speak/1")
        got = 0
        while piece := await stream.read(100_000):
            got += len(piece)
        assert got == 1 << 20


async def test_a_hundred_streams_at_once() -> None:
    async with two_hosts() as (client, server):
        server.set_handler(ECHO, echo)
        async with trio.open_nursery() as nursery:
            for n in range(100):

                async def one(data: bytes = n.to_bytes(1, "big") * 50_000) -> None:
                    assert await ask(client, server.peer_id, data) == data

                nursery.start_soon(one)


# -- frozen and killed peers -----------------------------------------------------------------------------------------


@asynccontextmanager
async def child_peer() -> AsyncIterator[tuple[trio.Process, str]]:
    """A real process with a host that echoes; killed at the end."""
    script = Path(__file__).with_name("child.py")
    root = Path(__file__).parents[2]
    async with trio.open_nursery() as nursery:
        run = partial(
            trio.run_process,
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            capture_stdout=False,
            check=False,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        process: trio.Process = await nursery.start(run)
        try:
            assert process.stdout is not None
            line = b""
            with trio.fail_after(60):
                while not line.endswith(b"\n"):
                    line += await process.stdout.receive_some(1000)
            yield process, line.decode().strip()
        finally:
            process.kill()


async def test_a_killed_peer_fails_every_call_at_once() -> None:
    async with child_peer() as (process, addr), open_host(create_new_key_pair(), HostConfig(listen=())) as host:
        peer_id = await host.connect(addr)
        stream = await host.open_stream(peer_id, ECHO)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def wait() -> None:
                    with pytest.raises(PeerUnreachable):
                        await stream.read(1)

                await wait_all_tasks_blocked()
                process.kill()
            with pytest.raises(PeerUnreachable):
                await stream.write(b"x")
            with pytest.raises(PeerUnreachable):
                await host.open_stream(peer_id, ECHO)
        assert not host.is_connected(peer_id)


async def test_a_frozen_peer_is_found_and_comes_back() -> None:
    config = HostConfig(listen=(), keep_alive_s=0.5, connect_s=0.5)
    async with child_peer() as (process, addr), open_host(create_new_key_pair(), config) as host:
        peer_id = await host.connect(addr)
        reading = await host.open_stream(peer_id, ECHO)
        writing = await host.open_stream(peer_id, ECHO)
        process.send_signal(signal.SIGSTOP)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:

                async def expect(call: Callable[[], Awaitable[object]]) -> None:
                    with pytest.raises(PeerUnreachable):
                        await call()

                nursery.start_soon(expect, lambda: reading.read(1))
                nursery.start_soon(expect, lambda: writing.write(bytes(64 << 20)))
        await until(lambda: not host.is_connected(peer_id))
        with pytest.raises(PeerUnreachable, match="stopped answering"):  # said at once: its kernel would still accept
            await host.open_stream(peer_id, ECHO)
        process.send_signal(signal.SIGCONT)
        await until(lambda: host.is_connected(peer_id))  # the host calls on it again by itself
        assert await ask(host, peer_id, b"awake") == b"awake"


# -- strangers -------------------------------------------------------------------------------------------------------


async def dial_raw(host: Host) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", int(host.addrs[0].split("/")[4]))


@pytest.mark.parametrize("protocol", ["/plaintext/2.0.0", "/secio/1.0.0", "/tls/1.0.0"])
async def test_only_noise_is_offered(protocol: str) -> None:
    async with open_host(create_new_key_pair(), LOOPBACK) as host:
        stranger = await dial_raw(host)
        await stranger.send_all(proposal(protocol))
        answer = b""
        expected = encode_line(MULTISTREAM) + encode_line("na")
        while len(answer) < len(expected):
            answer += await stranger.receive_some(1000)
        assert answer == expected
        await stranger.aclose()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
        b"\xff" * 10_000,
        proposal("/noise") + b"\x00\x00",
        proposal("/noise") + b"\xff\xff" + bytes(65535),
        proposal("/noise") + b"\x00\x20" + bytes(32),
    ],
    ids=["http", "garbage", "empty message", "long message", "null key"],
)
async def test_nonsense_instead_of_a_handshake_closes_the_socket(said: bytes) -> None:
    async with two_hosts() as (client, server):
        stranger = await dial_raw(server)
        with trio.fail_after(20):
            try:
                await stranger.send_all(said)
                await stranger.send_eof()
                while await stranger.receive_some(1000):
                    pass
            except trio.BrokenResourceError:
                pass
        await stranger.aclose()
        assert await client.ping(server.peer_id) > 0  # others do not notice


async def test_strangers_who_never_speak_are_bounded_in_time_and_number() -> None:
    config = replace(LOOPBACK, max_half_open=5, handshake_s=1.0)
    async with open_host(create_new_key_pair(), config) as server:
        silent = [await dial_raw(server) for _ in range(20)]
        async with open_host(create_new_key_pair(), HostConfig(listen=())) as client:
            await client.connect(server.addrs[0])  # a quick one gets through all the same
            assert await client.ping(server.peer_id) > 0
        with trio.fail_after(20):
            for stranger in silent:
                assert await stranger.receive_some(1) == b""
                await stranger.aclose()


async def test_who_is_idle_makes_room_and_who_is_served_stays() -> None:
    async with (
        open_host(create_new_key_pair(), replace(LOOPBACK, max_connections=2)) as server,
        open_host(create_new_key_pair(), HostConfig(listen=())) as one,
        open_host(create_new_key_pair(), HostConfig(listen=())) as two,
        open_host(create_new_key_pair(), HostConfig(listen=(), connect_s=2.0)) as three,
    ):
        server.set_handler(ECHO, echo)
        served = []
        for client in (one, two):
            await client.connect(server.addrs[0])
            stream = await client.open_stream(server.peer_id, ECHO)
            await stream.write(b"x")
            assert await stream.read(1) == b"x"
            served.append(stream)
        with pytest.raises(PeerUnreachable):
            await three.connect(server.addrs[0])
        await served[0].reset()
        conn = server._network.live_conn(ID.from_base58(one.peer_id))
        assert conn is not None
        assert isinstance(conn.muxed_conn, LibraryConn)
        idle = conn.muxed_conn.connection
        await until(lambda: idle.is_idle)
        await three.connect(server.addrs[0])
        assert await three.ping(server.peer_id) > 0
        await until(lambda: not server.is_connected(one.peer_id))
        await served[1].write(b"y")
        assert await served[1].read(1) == b"y"


async def test_one_peer_can_not_have_all_handlers() -> None:
    async with (
        open_host(create_new_key_pair(), replace(LOOPBACK, max_handlers_per_peer=8)) as server,
        open_host(create_new_key_pair(), HostConfig(listen=())) as greedy,
        open_host(create_new_key_pair(), HostConfig(listen=())) as honest,
    ):
        await greedy.connect(server.addrs[0])
        answered = 0
        with suppress(PeerUnreachable):
            for _ in range(9):
                stream = await greedy.open_stream(server.peer_id, PING)
                await stream.write(b"x" * PING_BYTES)
                answered += len(await stream.read(PING_BYTES)) == PING_BYTES
        assert 0 < answered <= 8
        await honest.connect(server.addrs[0])
        assert await honest.ping(server.peer_id) > 0


@pytest.mark.parametrize(("words", "least", "most"), [(b"?" * 64, 24, 32), (b"!" + b"?" * 64, 8, 16)])
async def test_who_opens_streams_too_fast_waits_alone(words: bytes, least: int, most: int) -> None:
    """A few of the 32 go to identify; a shout costs 16 more."""
    slow = replace(LOOPBACK, streams_per_s=1e-3, streams_burst=32, close_s=0.1)
    async with (
        open_host(create_new_key_pair(), slow) as server,
        open_host(create_new_key_pair(), HostConfig(listen=(), close_s=0.1)) as greedy,
        open_host(create_new_key_pair(), HostConfig(listen=())) as honest,
    ):
        calls: Counter[PeerId] = Counter()

        async def answer(stream: ByteStream) -> None:
            word = await stream.read(1)
            if word == b"!":
                raise RemoteProtocolError("shouting", stream.remote_peer)
            calls[stream.remote_peer] += 1
            await stream.write(word)

        server.set_handler(ECHO, answer)
        await greedy.connect(server.addrs[0])
        for word in words:
            await (await greedy.open_stream(server.peer_id, ECHO)).write(bytes([word]))
        await until(lambda: calls[greedy.peer_id] >= least)
        await honest.connect(server.addrs[0])
        assert await ask(honest, server.peer_id, b"?") == b"?"
        assert calls[greedy.peer_id] <= most


async def test_served_streams_do_not_count() -> None:
    slow = replace(LOOPBACK, streams_per_s=1e-3, streams_burst=32)
    async with (
        open_host(create_new_key_pair(), slow) as server,
        open_host(create_new_key_pair(), HostConfig(listen=())) as client,
    ):

        async def answer(stream: ByteStream) -> None:
            await stream.write(bytes(await stream.read(1)))
            server.charge(stream.remote_peer, -1)

        server.set_handler(ECHO, answer)
        await client.connect(server.addrs[0])
        for _ in range(100):
            assert await ask(client, server.peer_id, b"?") == b"?"


async def test_connections_from_one_address_wait_their_turn() -> None:
    slow = replace(LOOPBACK, connects_per_s=1e-3, connects_burst=3)
    async with open_host(create_new_key_pair(), slow) as server, AsyncExitStack() as clients:
        for allowed in (True, True, True, False):
            config = HostConfig(listen=(), connect_s=5.0 if allowed else 0.1)
            client = await clients.enter_async_context(open_host(create_new_key_pair(), config))
            if allowed:
                await client.connect(server.addrs[0])
            else:
                with pytest.raises(PeerUnreachable):
                    await client.connect(server.addrs[0])


# -- what is left behind ---------------------------------------------------------------------------------------------


def count_tasks(task: trio.lowlevel.Task) -> int:
    return 1 + sum(count_tasks(child) for nursery in task.child_nurseries for child in nursery.child_tasks)


async def test_descriptors_tasks_and_memory_return_to_the_start() -> None:
    """After three hundred connections that came and went, with streams closed, reset and abandoned."""
    me, root = psutil.Process(), trio.lowlevel.current_root_task()
    assert root is not None
    async with open_host(create_new_key_pair(), replace(LOOPBACK, connects_burst=1000)) as server:
        server.set_handler(ECHO, echo)
        keys = create_new_key_pair()

        async def round_trip() -> None:
            async with open_host(keys, HostConfig(listen=())) as client:
                peer_id = await client.connect(server.addrs[0])
                assert await ask(client, peer_id, b"x" * 1000) == b"x" * 1000
                abandoned, _ = await meet(client, server)
                await abandoned.write(b"left behind")
                await (await client.open_stream(peer_id, ECHO)).reset()
            await until(lambda: not server.connected_peers())

        for _ in range(5):
            await round_trip()
        await wait_all_tasks_blocked(0.05)
        gc.collect()
        before = me.num_fds(), count_tasks(root)
        memory_before = me.memory_info().rss
        for _ in range(295):
            await round_trip()
        await wait_all_tasks_blocked(0.05)
        gc.collect()
        assert me.num_fds() == before[0]
        # Handlers of `meet` wait for ever by design, as a handler deep in a computation would.
        assert count_tasks(root) - before[1] <= 295
        assert me.memory_info().rss - memory_before < 16 << 20


async def test_leaving_is_quick_even_when_nobody_says_goodbye() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await listener.aclose()
    async with child_peer() as (process, addr):
        with trio.fail_after(20):
            async with open_host(create_new_key_pair(), HostConfig(listen=(), close_s=0.2)) as host:
                peer_id = await host.connect(addr)
                stream = await host.open_stream(peer_id, ECHO)
                process.send_signal(signal.SIGSTOP)
                with trio.move_on_after(0.1):
                    await stream.write(bytes(64 << 20))
