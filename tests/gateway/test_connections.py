"""Clients that are not polite, over bare sockets."""

from __future__ import annotations

import json
import socket
import sys

import pytest
import trio

from tests.gateway.conftest import NAME, OpenDoor
from tests.swarm.conftest import all_leases_returned


async def connect(url: str) -> trio.SocketStream:
    host, _, port = url.removeprefix("http://").partition(":")
    return await trio.open_tcp_stream(host, int(port))


def handlers() -> list[str]:
    """The server's tasks that have a connection."""
    found, left = [], [trio.lowlevel.current_root_task()]
    while left:
        task = left.pop()
        assert task is not None
        found.append(task.name)
        left += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return [name for name in found if "_run_handler" in name or "hypercorn.trio" in name]


async def flood(stream: trio.SocketStream, pieces: int) -> None:
    try:
        for _ in range(pieces):
            await stream.send_all(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
    except trio.BrokenResourceError:
        pass  # we were cut off


@pytest.mark.parametrize(
    ("path", "status"), [("POST /v1/completions", 413), ("POST /nowhere", 404), ("GET /health", 200), ("GET /", 200)]
)
async def test_a_body_that_nobody_wants_ends_the_connection(open_door: OpenDoor, path: str, status: int) -> None:
    async with open_door(range(1)) as door:
        waiting = len(handlers())
        stream = await connect(door.url)
        head = "host: localhost\r\ntransfer-encoding: chunked\r\ncontent-type: application/json"
        await stream.send_all(f"{path} HTTP/1.1\r\n{head}\r\n\r\n".encode())
        told = b""
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flood, stream, 500)
                try:
                    while fresh := await stream.receive_some():
                        told += fresh
                except trio.BrokenResourceError:
                    pass
                nursery.cancel_scope.cancel()
        assert told.startswith(f"HTTP/1.1 {status} ".encode())
        await stream.aclose()
        with trio.fail_after(10):
            while len(handlers()) > waiting:  # noqa: ASYNC110  # a poll of the state waited for
                await trio.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives up on who stops reading")
async def test_a_client_that_stops_reading_frees_the_caches(open_door: OpenDoor) -> None:
    async with open_door(stalled_s=1.0) as door:
        host, _, port = door.url.removeprefix("http://").partition(":")
        raw = trio.socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await raw.connect((host, int(port)))
        settings = {"stream": True, "logprobs": 5, "max_tokens": 2000, "temperature": 0, "n": 2}
        body = json.dumps({"model": NAME, "prompt": "1, 2, 3, 4,", **settings}).encode()
        head = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        await trio.SocketStream(raw).send_all(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
        assert door.server.server is not None
        with trio.fail_after(30):
            while not door.server.server.inbound.sessions:  # noqa: ASYNC110  # a poll of the state waited for
                await trio.sleep(0.001)
        with trio.fail_after(60):  # "cut": they ended because nobody read, not by themselves
            while 'petals_answers_total{ended="cut"} 2' not in (await door.get("/metrics")).text:
                pass
        await all_leases_returned(door.server)
        raw.close()
