"""What every ByteStream promises (protocols/stream.py): in memory, over our transport, over the stock stack."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from petals.protocols.errors import PeerUnreachable
from petals.protocols.stream import ByteStream
from tests.transport.conftest import MakePair

MIB = 1 << 20


async def read_all(stream: ByteStream) -> bytes:
    data = bytearray()
    while piece := await stream.read(MIB):
        data += piece
    return bytes(data)


async def write_and_end(stream: ByteStream, data: bytes) -> None:
    await stream.write(data)
    await stream.close_write()


async def test_bytes_arrive_in_order_whatever_the_pieces(make_pair: MakePair) -> None:
    near, far = await make_pair()
    data = random.Random(1).randbytes(300_000)
    got = bytearray()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            for start in range(0, len(data), 7001):
                await near.write(memoryview(data)[start : start + 7001])
            await near.close_write()

        while piece := await far.read(1234):
            assert len(piece) <= 1234
            got += piece
    assert got == data


async def test_the_end_of_one_direction_leaves_the_other_open(make_pair: MakePair) -> None:
    near, far = await make_pair()
    await write_and_end(near, b"question")
    assert await read_all(far) == b"question"
    assert bytes(await far.read(1)) == b""  # the end stays the end
    await write_and_end(far, b"answer")
    assert await read_all(near) == b"answer"


async def test_sixteen_mebibytes_in_both_directions_at_once(make_pair: MakePair) -> None:
    near, far = await make_pair()
    there, back = random.Random(2).randbytes(16 * MIB), random.Random(3).randbytes(16 * MIB)
    got: dict[str, bytes] = {}
    async with trio.open_nursery() as nursery:

        async def collect(name: str, stream: ByteStream) -> None:
            got[name] = await read_all(stream)

        nursery.start_soon(write_and_end, near, there)
        nursery.start_soon(write_and_end, far, back)
        nursery.start_soon(collect, "there", far)
        nursery.start_soon(collect, "back", near)
    assert got["there"] == there
    assert got["back"] == back


async def test_a_paused_reader_pauses_its_writer_and_nobody_else(make_pair: MakePair) -> None:
    near, far = await make_pair()
    near_2, far_2 = await make_pair()
    written = 0
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def fill() -> None:
            nonlocal written
            for _ in range(256):
                await near.write(bytes(65536))
                written += 65536
            await near.close_write()

        await trio.testing.wait_all_tasks_blocked(0.05)
        assert 0 < written <= 4 * MIB  # the largest window there is
        await write_and_end(near_2, b"another stream goes on")
        assert await read_all(far_2) == b"another stream goes on"
        assert len(await read_all(far)) == 256 * 65536


async def test_a_reset_is_an_error_at_the_other_end(make_pair: MakePair) -> None:
    near, far = await make_pair()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def wait_for_it() -> None:
            with pytest.raises(PeerUnreachable):
                await far.read(1)

        await trio.testing.wait_all_tasks_blocked()
        await near.reset()
    with pytest.raises(PeerUnreachable):
        await far.write(b"x")
    with pytest.raises(PeerUnreachable):
        await near.read(1)


async def test_closing_and_resetting_twice_is_fine(make_pair: MakePair) -> None:
    near, far = await make_pair()
    for _ in range(2):
        await near.close()
    await near.reset()  # after a clean end: nothing left to lose
    for _ in range(2):
        await far.reset()
    with pytest.raises((PeerUnreachable, trio.ClosedResourceError)):
        await near.write(b"x")


async def test_reads_cut_at_random_lose_nothing(make_pair: MakePair) -> None:
    near, far = await make_pair()
    dice = random.Random(4)
    data = dice.randbytes(2 * MIB)
    got, cuts = bytearray(), 0
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            start = 0
            while start < len(data):
                size = dice.randrange(1, 20_000)
                await near.write(data[start : start + size])
                start += size
                if dice.random() < 0.5:
                    await trio.sleep(dice.random() / 1000)
            await near.close_write()

        while True:
            with trio.move_on_after(dice.random() / 1000) as scope:
                piece = await far.read(10_000)
            if scope.cancelled_caught:
                cuts += 1
            elif piece:
                got += piece
            else:
                break
    assert got == data
    assert cuts > 10  # otherwise nothing was tried


async def test_a_cut_write_resets_its_stream_and_no_other(make_pair: MakePair) -> None:
    near, far = await make_pair()
    near_2, far_2 = await make_pair()
    with trio.move_on_after(0.05) as scope:
        await near.write(bytes(32 * MIB))
    assert scope.cancelled_caught
    with pytest.raises(PeerUnreachable):
        await read_all(far)
    with pytest.raises(PeerUnreachable):
        await near.write(b"more")
    await write_and_end(near_2, b"fine")
    assert await read_all(far_2) == b"fine"
