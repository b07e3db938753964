"""MessageStream on a stream in memory."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from petals.peer.net.wire.loopback import LoopbackStream
from petals.protocols.errors import PeerUnreachable, RemoteProtocolError
from petals.protocols.framing import encode_frame
from petals.protocols.stream import MessageStream
from tests.fakes.streams import memory_stream_pair


def message_pair(max_message_bytes: int = 1000) -> tuple[MessageStream, MessageStream]:
    near, far = memory_stream_pair()
    return (
        MessageStream(near, max_message_bytes=max_message_bytes),
        MessageStream(far, max_message_bytes=max_message_bytes),
    )


async def test_messages_and_payloads_take_turns() -> None:
    near, far = message_pair()
    tensor, tail = random.Random(1).randbytes(100_000), bytearray(b"tail")
    await near.write_message(b"one")
    await near.write_message(b"two", tensor, memoryview(tail), b"")
    await near.write_message(b"")
    await near.close_write()
    assert await far.read_message() == b"one"
    assert await far.read_message() == b"two"
    buffer = bytearray(100_000)
    await far.read_into(memoryview(buffer))
    assert buffer == tensor
    assert await far.read_exactly(4) == b"tail"
    assert await far.read_message() == b""
    assert await far.read_message() is None


async def test_a_small_message_and_its_payload_are_one_write() -> None:
    near, _ = memory_stream_pair()
    writes: list[int] = []

    class Counting(LoopbackStream):
        async def write(self, data: bytes | bytearray | memoryview) -> None:
            writes.append(len(data))

    near.__class__ = Counting
    messages = MessageStream(near, max_message_bytes=1000)
    await messages.write_message(b"head", bytes(100), bytes(200))
    await messages.write_message(b"head", bytes(1 << 20))
    assert writes == [305, 5, 1 << 20]


@pytest.mark.parametrize("cut", range(1, 8))
async def test_an_end_inside_a_message_is_the_peers_fault(cut: int) -> None:
    near, far = message_pair()
    await near.stream.write(encode_frame(b"1234567")[:cut])
    await near.close_write()
    with pytest.raises(RemoteProtocolError, match="inside a message") as caught:
        await far.read_message()
    assert caught.value.peer_id == "peer-near"


async def test_a_long_message_is_refused_by_its_length_alone() -> None:
    near, far = message_pair(max_message_bytes=10)
    await near.stream.write(encode_frame(bytes(11))[:1])
    with pytest.raises(RemoteProtocolError, match="limit is 10"):
        await far.read_message()


async def test_a_payload_that_ends_early_is_the_peers_fault() -> None:
    near, far = message_pair()
    await near.stream.write(b"12345")
    await near.close_write()
    with pytest.raises(RemoteProtocolError, match="3 bytes too early"):
        await far.read_exactly(8)


async def test_cut_reads_lose_nothing() -> None:
    near, far = message_pair()
    await near.stream.write(encode_frame(b"message")[:4])
    with trio.move_on_after(0):
        await far.read_message()
    await near.stream.write(encode_frame(b"message")[4:] + b"pay")
    assert await far.read_message() == b"message"

    async def cut_when_blocked(read: trio.CancelScope) -> None:
        await wait_all_tasks_blocked()
        read.cancel()

    for read in (far.read_exactly, far.read_payload):
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(cut_when_blocked, scope)
                await read(7)
        assert scope.cancelled_caught
    await near.stream.write(b"load")
    assert await far.read_exactly(7) == b"payload"


async def test_a_cut_write_is_seen_as_a_reset() -> None:
    near, far = message_pair()
    with trio.move_on_after(0.01):
        await near.write_message(b"head", bytes(8 << 20))
    with pytest.raises(PeerUnreachable):
        await far.read_exactly(9 << 20)
