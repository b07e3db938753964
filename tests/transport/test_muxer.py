"""The shell on real sockets: cancellation, back-pressure, death and goodbye."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from petals.peer.net.wire.byte_pipe import PortableTcpPipe, TcpPipe, tcp_pipe
from petals.peer.net.wire.muxer import Connection, MuxedStream, MuxerConfig
from petals.peer.net.wire.noise import NoiseFraming
from petals.peer.net.wire.yamux import HEADER, FrameType, YamuxLimits
from petals.protocols.errors import PeerUnreachable, RemoteProtocolError
from petals.protocols.types import PeerId


@pytest.fixture(autouse=True, params=["posix", "portable"])
def _system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds, too, where sockets are no files (Windows)."""
    if request.param == "portable":
        monkeypatch.delattr(os, "readv")
        monkeypatch.delattr(os, "writev")


KEYS = bytes(range(32)), bytes(range(32, 64))
NEAR, FAR = PeerId("peer-near"), PeerId("peer-far")


class End:
    """One connection and the streams its peer opened."""

    def __init__(self, stream: trio.SocketStream, *, is_client: bool, config: MuxerConfig) -> None:
        self.accepted_send, self.accepted = trio.open_memory_channel[MuxedStream](10_000)
        self.connection = Connection(
            tcp_pipe(stream),
            NoiseFraming(*(KEYS if is_client else reversed(KEYS))),
            remote_peer=FAR if is_client else NEAR,
            is_client=is_client,
            on_stream=self.accepted_send.send_nowait,
            config=config,
        )


async def socket_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    near = await trio.open_tcp_stream(*listener.socket.getsockname())
    far = await listener.accept()
    await listener.aclose()
    return near, far


async def test_the_pipe_is_the_fastest_that_the_system_has() -> None:
    near, far = await socket_pair()
    async with near, far:
        assert isinstance(tcp_pipe(near), TcpPipe if hasattr(os, "writev") else PortableTcpPipe)


@asynccontextmanager
async def connected(config: MuxerConfig | None = None) -> AsyncIterator[tuple[End, End]]:
    near_socket, far_socket = await socket_pair()
    config = config or MuxerConfig()
    near, far = End(near_socket, is_client=True, config=config), End(far_socket, is_client=False, config=config)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.connection.run)
        nursery.start_soon(far.connection.run)
        yield near, far
        nursery.cancel_scope.cancel()


async def pair_of(near: End, far: End) -> tuple[MuxedStream, MuxedStream]:
    stream = near.connection.open_stream()
    await stream.write(b"!")
    other = await far.accepted.receive()
    assert bytes(await other.read(1)) == b"!"
    return stream, other


async def read_exactly(stream: MuxedStream, n: int) -> bytes:
    data = bytearray()
    while len(data) < n:
        piece = await stream.read(n - len(data))
        assert piece, "ended early"
        data += piece
    return bytes(data)


async def cancel_after(ticks: int, scope: trio.CancelScope) -> None:
    """Cut at a random checkpoint, not at a random time: many more cuts, and no waiting."""
    for _ in range(ticks):
        await trio.lowlevel.checkpoint()
    scope.cancel()


# -- cancellation ----------------------------------------------------------------------------------------------------


async def test_ten_thousand_cut_reads_and_writes_lose_nothing() -> None:
    """Reads are cut 8,000 times on streams that then go on; writes 2,000 times on streams that are then over. A
    witness exchanges bytes on the same connection all the time. Every byte that arrives is the right one."""
    dice = random.Random(1)
    pattern = dice.randbytes(1 << 20)
    twice = memoryview(pattern + pattern)
    async with connected() as (near, far):
        witness_near, witness_far = await pair_of(near, far)
        witnessed = 0

        async def echo() -> None:
            while True:
                await witness_far.write(await witness_far.read(100_000))

        async def witness() -> None:
            nonlocal witnessed
            while True:
                data = dice.randbytes(dice.randrange(1, 3000))
                await witness_near.write(data)
                assert await read_exactly(witness_near, len(data)) == data
                witnessed += 1

        async def cut_reads(cuts: int) -> None:
            stream, other = await pair_of(near, far)
            position = 0
            async with trio.open_nursery() as inner:

                @inner.start_soon
                async def feed() -> None:
                    sent = 0
                    while True:
                        size = dice.choice([1, 100, 3000, 40_000])
                        piece = twice[sent % len(pattern) :][:size]
                        await stream.write(piece)
                        sent += len(piece)
                        for _ in range(dice.randrange(20)):
                            await trio.lowlevel.checkpoint()

                while cuts:
                    async with trio.open_nursery() as racing:
                        scope = trio.CancelScope()
                        if dice.random() < 0.3:
                            scope.cancel()
                        racing.start_soon(cancel_after, dice.randrange(4), scope)
                        piece: bytes | bytearray | memoryview = b""
                        with scope:
                            piece = await other.read(dice.choice([1, 1000, 100_000]))
                    cuts -= not piece
                    start = position % len(pattern)
                    assert bytes(piece) == bytes(twice[start : start + len(piece)])
                    position += len(piece)
                inner.cancel_scope.cancel()

        async def cut_writes(cuts: int) -> None:
            while cuts:
                stream, other = await pair_of(near, far)
                got = bytearray()
                async with trio.open_nursery() as inner:

                    @inner.start_soon
                    async def read_on(other: MuxedStream = other, got: bytearray = got) -> None:
                        try:
                            while piece := await other.read(100_000):
                                got += piece
                        except PeerUnreachable:
                            return
                        raise AssertionError("a cut write looks like a whole one")

                    scope = trio.CancelScope()
                    inner.start_soon(cancel_after, dice.randrange(6), scope)
                    with scope:
                        await stream.write(twice[:600_000])
                    await stream.reset()  # for the few that were through before the cut
                    cuts -= 1
                assert got == twice[: len(got)]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            nursery.start_soon(witness)
            async with trio.open_nursery() as cutting:
                for _ in range(4):
                    cutting.start_soon(cut_reads, 2000)
                for _ in range(2):
                    cutting.start_soon(cut_writes, 1000)
            nursery.cancel_scope.cancel()
        assert witnessed > 100
        assert near.connection.error is far.connection.error is None


async def test_cutting_a_close_or_an_open_leaves_the_connection_alone() -> None:
    async with connected() as (near, far):
        for _ in range(200):
            with trio.CancelScope() as scope:
                scope.cancel()
                stream = near.connection.open_stream()
                await stream.write(b"x")
            with trio.CancelScope() as scope:
                scope.cancel()
                stream = near.connection.open_stream()
                await stream.close()
        stream, other = await pair_of_fresh(near, far)
        await other.write(b"alive")
        assert await read_exactly(stream, 5) == b"alive"


async def pair_of_fresh(near: End, far: End) -> tuple[MuxedStream, MuxedStream]:
    """Like `pair_of`, past streams that came to nothing."""
    stream = near.connection.open_stream()
    await stream.write(b"!")
    while True:
        other = await far.accepted.receive()
        try:
            if bytes(await other.read(1)) == b"!":
                return stream, other
        except PeerUnreachable:
            continue


async def test_two_readers_of_one_stream_are_a_bug_that_is_named() -> None:
    async with connected() as (near, far):
        stream, other = await pair_of(near, far)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.read, 1)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await other.read(1)
            await stream.write(b"x")


# -- many streams, and windows ---------------------------------------------------------------------------------------


async def test_six_hundred_open_streams() -> None:
    async with connected() as (near, far):
        pairs = [await pair_of(near, far) for _ in range(600)]
        assert len(near.connection.session.streams) == len(far.connection.session.streams) == 600
        async with trio.open_nursery() as nursery:
            for index, (stream, other) in enumerate(pairs):

                async def exchange(stream: MuxedStream = stream, other: MuxedStream = other, n: int = index) -> None:
                    await stream.write(n.to_bytes(2, "big") * 1000)
                    await other.write(await read_exactly(other, 2000))
                    assert await read_exactly(stream, 2000) == n.to_bytes(2, "big") * 1000
                    await stream.close()
                    assert bytes(await other.read(1)) == b""
                    await other.close()

                nursery.start_soon(exchange)
        await wait_all_tasks_blocked(0.01)
        for end in (near, far):
            assert end.connection.session.streams == {}
            assert end.connection.session.buffered == end.connection.session.granted == 0


async def test_the_accept_limit_refuses_and_goes_on() -> None:
    async with connected(MuxerConfig(limits=YamuxLimits(max_streams=20))) as (near, far):
        near.connection.session.limits = YamuxLimits(max_streams=1000)  # a peer that does not know our limit
        streams = [near.connection.open_stream() for _ in range(30)]
        for stream in streams:
            await stream.write(b"!")
        refused = 0
        for stream in streams[20:]:
            with pytest.raises(PeerUnreachable, match="reset by the peer"):
                await stream.read(1)
            refused += 1
        assert refused == 10
        others = [await far.accepted.receive() for _ in range(20)]
        await others[0].write(b"ok")
        assert await read_exactly(streams[0], 2) == b"ok"


async def test_a_reader_that_pauses_for_many_keep_alives_loses_nothing() -> None:
    """Forty keep-alive times, the scale of minutes with the default; the real minute is below."""
    await pause(MuxerConfig(keep_alive_s=0.05), 2.0)


@pytest.mark.swarm
@pytest.mark.parametrize("_system", ["posix"], indirect=True)  # a minute of sleep is enough once
async def test_a_reader_that_pauses_for_a_minute_loses_nothing() -> None:
    await pause(MuxerConfig(), 60.0)


async def pause(config: MuxerConfig, seconds: float) -> None:
    data = random.Random(2).randbytes(6 << 20)
    async with connected(config) as (near, far):
        stream, other = await pair_of(near, far)
        near_2, far_2 = await pair_of(near, far)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send() -> None:
                await stream.write(data)
                await stream.close_write()

            resume_at = trio.current_time() + seconds
            while trio.current_time() < resume_at:  # the pause itself, during which others go on
                await near_2.write(b"others")
                assert await read_exactly(far_2, 6) == b"others"
                await trio.sleep(seconds / 20)
            assert await read_exactly(other, len(data)) == data


# -- death and goodbye -----------------------------------------------------------------------------------------------


async def test_a_peer_that_falls_silent_is_dead_and_everybody_is_told() -> None:
    near_socket, far_socket = await socket_pair()  # far's kernel takes what comes; nobody answers
    near = End(near_socket, is_client=True, config=MuxerConfig(keep_alive_s=0.2))
    async with trio.open_nursery() as nursery:
        told: list[bool] = []
        near.connection.on_frozen = lambda: told.append(near.connection.error is None)
        nursery.start_soon(near.connection.run)
        reading, writing = near.connection.open_stream(), near.connection.open_stream()

        async def expect(call: Callable[[], object]) -> None:
            with pytest.raises(PeerUnreachable, match="silent"):
                await call()  # type: ignore[misc]

        with trio.fail_after(30):
            async with trio.open_nursery() as waiting:
                waiting.start_soon(expect, lambda: reading.read(1))
                waiting.start_soon(expect, lambda: writing.write(bytes(32 << 20)))
            await near.connection.closed.wait()
        assert told == [True]
        with pytest.raises(PeerUnreachable, match="silent"):
            near.connection.open_stream()
    await far_socket.aclose()


async def test_an_idle_connection_is_kept_alive_by_pings() -> None:
    async with connected(MuxerConfig(keep_alive_s=0.1)) as (near, far):
        answers = 0
        while answers < 5:  # pings, each more than a keep-alive's quarter after the last
            await trio.sleep(0.01)
            if near.connection.rtt_s is not None:
                answers += 1
                near.connection.rtt_s = None
        assert near.connection.error is far.connection.error is None


async def test_what_was_written_before_a_goodbye_arrives() -> None:
    data = random.Random(3).randbytes(3 << 20)
    async with connected() as (near, far):
        stream, other = await pair_of(near, far)
        got = bytearray()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def collect() -> None:
                while piece := await other.read(100_000):
                    got.extend(piece)

            await stream.write(data)
            await stream.close()
            await near.connection.close()
        assert got == data
        with trio.fail_after(10):
            await far.connection.closed.wait()
        assert far.connection.session.remote_gone == 0
        with pytest.raises(PeerUnreachable):
            far.connection.open_stream()


async def test_bytes_that_arrived_can_be_read_after_the_connection_died() -> None:
    async with connected() as (near, far):
        stream, other = await pair_of(near, far)
        await stream.write(b"last words")
        await stream.close_write()
        await wait_all_tasks_blocked(0.01)
        await near.connection.close()
        await far.connection.closed.wait()
        assert await read_exactly(other, 10) == b"last words"
        assert bytes(await other.read(1)) == b""


# -- hostile wires ---------------------------------------------------------------------------------------------------


def encrypted(plaintext: bytes) -> bytes:
    return b"".join(NoiseFraming(*KEYS).encrypt([plaintext]))


SPOILT = {
    "garbage": (b"\xff" * 70_000, RemoteProtocolError),
    "forged": (encrypted(b"x" * 12)[:-1] + b"\x00", RemoteProtocolError),
    "shorter than a tag": (b"\x00\x01x", RemoteProtocolError),
    "unknown stream": (encrypted(HEADER.pack(0, FrameType.DATA, 0, 77, 1) + b"x"), RemoteProtocolError),
    "version": (encrypted(HEADER.pack(9, 0, 0, 0, 0)), RemoteProtocolError),
    "giant": (encrypted(HEADER.pack(0, 1, 1, 1, 0) + HEADER.pack(0, 0, 0, 1, 2**32 - 1)), RemoteProtocolError),
    "ping flood": (None, RemoteProtocolError),
    "cut in a message": (encrypted(b"x" * 100)[:50], PeerUnreachable),
    "nothing": (b"", PeerUnreachable),
}


@pytest.mark.parametrize(("wire", "kind"), SPOILT.values(), ids=SPOILT)
async def test_a_hostile_wire_ends_its_connection_with_a_typed_error(wire: bytes | None, kind: type[Exception]) -> None:
    if wire is None:
        wire = encrypted(HEADER.pack(0, FrameType.PING, 1, 0, 5) * 3_000_000)
    hostile, far_socket = await socket_pair()
    far = End(far_socket, is_client=False, config=MuxerConfig())
    async with connected() as (near_2, far_2), trio.open_nursery() as nursery:
        nursery.start_soon(far.connection.run)
        waiting = far.connection.open_stream()

        async def attack() -> None:
            try:
                await hostile.send_all(wire)
                await hostile.send_eof()
            except trio.BrokenResourceError:
                pass  # thrown out before it was through

        with trio.fail_after(60):
            nursery.start_soon(attack)
            with pytest.raises(kind) as caught:
                await waiting.read(1)
            assert caught.value.peer_id == NEAR  # type: ignore[attr-defined]
            await far.connection.closed.wait()
        stream, other = await pair_of(near_2, far_2)  # others did not notice
        await other.write(b"fine")
        assert await read_exactly(stream, 4) == b"fine"
    await hostile.aclose()
