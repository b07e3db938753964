"""Hosts on loopback, and pairs of streams of every kind the contract is for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair

from petals.peer.net.host import Host, HostConfig, open_host
from petals.peer.net.wire.pnet import SwarmKey
from petals.protocols.stream import ByteStream
from tests.fakes.streams import memory_stream_pair

LOOPBACK = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
MEET = "/test/meet/1"

STOCK_CANNOT = {
    "test_a_reset_is_an_error_at_the_other_end": "a reset reads like a clean end",
    "test_a_paused_reader_pauses_its_writer_and_nobody_else": "a writer that waits 5 s for its window is reset",
    "test_a_cut_write_resets_its_stream_and_no_other": "a cut write desynchronises the whole connection",
    "test_reads_cut_at_random_lose_nothing": "a cut read loses what the muxer had popped already",
    "test_closing_and_resetting_twice_is_fine": "writing after close raises nothing",
}
"""Why py-libp2p's own stack is not asked, test by test (docs/transport.md)."""

MakePair = Callable[[], Awaitable[tuple[ByteStream, ByteStream]]]


@asynccontextmanager
async def two_hosts(config: HostConfig = LOOPBACK) -> AsyncIterator[tuple[Host, Host]]:
    """A dialler that listens on nothing and the host it is connected to."""
    async with (
        open_host(create_new_key_pair(), config) as server,
        open_host(create_new_key_pair(), replace(config, listen=())) as client,
    ):
        await client.connect(server.addrs[0])
        yield client, server


async def meet(client: Host, server: Host) -> tuple[ByteStream, ByteStream]:
    """A new stream from client to server: both ends, to be used by the test. The server's end lives until closed."""
    send, receive = trio.open_memory_channel[ByteStream](1)

    async def hand_over(stream: ByteStream) -> None:
        await send.send(stream)
        await trio.sleep_forever()

    server.set_handler(MEET, hand_over)
    near = await client.open_stream(server.peer_id, MEET)
    with trio.fail_after(10):
        return near, await receive.receive()


@pytest.fixture(params=["memory", "petals", "private", pytest.param("stock", marks=pytest.mark.stock)])
async def make_pair(request: pytest.FixtureRequest) -> AsyncIterator[MakePair]:
    """Makes new pairs of stream ends: (the opener's, the other's), all on one connection."""
    if request.param == "memory":

        async def memory() -> tuple[ByteStream, ByteStream]:
            return memory_stream_pair()

        yield memory
        return
    if request.param == "stock" and (reason := STOCK_CANNOT.get(request.node.originalname)):
        pytest.skip(f"the stock stack cannot: {reason}")
    config = replace(LOOPBACK, transport="stock" if request.param == "stock" else "petals")
    if request.param == "private":
        config = replace(config, swarm_key=SwarmKey(bytes(range(32))))
    async with two_hosts(config) as (client, server):

        async def real() -> tuple[ByteStream, ByteStream]:
            return await meet(client, server)

        yield real
