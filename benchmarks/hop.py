"""What a hop costs beyond its compute: one serving process, one client process, loopback.

    python benchmarks/hop.py [--rounds 5] [--steps 200] [--only steps open many large]

A step of one token at hidden size 1,024 in float32, taken apart; opening a session on a warm connection; a hundred
sessions on one connection; large tensors. References in the same run, in turns: an echo of the same bytes over a plain
trio socket, and the simplest server there can be, which computes the same blocks in its event loop between `receive`
and `send`: its round trip minus compute is what a machine pays for waking up two processes whose caches the blocks'
weights have just swept.
"""

from __future__ import annotations

import argparse
import math
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import torch
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from servers import server
from shapes import SHAPES, model_of

from petals import PeerConfig, open_peer
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from petals.peer.client.model_client import ModelClient
from petals.peer.client.session.session import HopTrace, RemoteSession
from petals.peer.client.tracing import PARTS
from petals.peer.net.host import HostConfig, open_host
from petals.protocols import messages_pb2 as pb
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.tensors import check_header, decode_tensor, encode_tensor

SECTIONS = ("steps", "open", "many", "large")
TENSORS = "/bench/tensors/1"
MANY = 100
LARGE = (512, 16, 1024)
"""Shape of a large tensor."""
LARGE_BYTES = 4 * math.prod(LARGE)
WARM_UP = 20
NUMBER = struct.Struct("<d")


# -- the references ----------------------------------------------------------------------------------------------------


async def receive(stream: trio.SocketStream, n: int) -> bytes:
    data = b""
    while len(data) < n:
        piece = await stream.receive_some(n - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


async def refer(size: int, model: str | None = None) -> None:
    """The reference's process: on each connection `size` bytes come, and go back behind the seconds of compute: none
    without a `model`."""
    span = None
    if model is not None:
        torch.set_num_threads(1)
        checkpoint = open_checkpoint(model)
        span = load_span(checkpoint, range(checkpoint.num_blocks), dtype=torch.float32)
        span.calibrate()

    async def handle(stream: trio.SocketStream) -> None:
        cache = None if span is None else span.new_cache(span.blocks, 1, 4096)
        try:
            while True:
                data, took = await receive(stream, size), 0.0
                if span is not None and cache is not None:
                    hidden = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(1, 1, -1)
                    started = time.perf_counter()
                    with torch.inference_mode():
                        data = span.step(hidden, cache).numpy().tobytes()
                    took = time.perf_counter() - started
                await stream.send_all(NUMBER.pack(took) + data)
        except EOFError:
            return

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print(listeners[0].socket.getsockname()[1], flush=True)
    await trio.serve_listeners(handle, listeners)


@contextmanager
def reference(*words: str) -> Iterator[list[str]]:
    """A process of `refer`, or of `take_tensors`; yields the words it says."""
    command = [sys.executable, __file__, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()
        process.kill()


async def plain_step(stream: trio.SocketStream, data: bytes) -> tuple[float, float]:
    """Seconds of a round trip to a reference, and of the compute in it."""
    started = time.perf_counter()
    await stream.send_all(data)
    answer = await receive(stream, NUMBER.size + len(data))
    return time.perf_counter() - started, NUMBER.unpack_from(answer)[0]


# -- one step ----------------------------------------------------------------------------------------------------------


async def steps(client: ModelClient, echo: int, simple: int, options: argparse.Namespace) -> None:
    """The table of a decode step."""
    hidden = torch.randn(1, 1, client.checkpoint.hidden_size)
    data = hidden.numpy().tobytes()
    plain, simplest = [await trio.open_tcp_stream("127.0.0.1", port) for port in (echo, simple)]
    total = WARM_UP + options.rounds * (WARM_UP + options.steps)
    session = await client.open_session(client.blocks, 1, total)
    trips: list[float] = []
    floors: list[float] = []
    whole: list[float] = []
    hops: list[HopTrace] = []
    for _ in range(options.rounds):
        for index in range(WARM_UP + options.steps):
            took, _ = await plain_step(plain, data)
            trips += [took] if index >= WARM_UP else []
        for index in range(WARM_UP + options.steps):
            took, computed = await plain_step(simplest, data)
            floors += [took - computed] if index >= WARM_UP else []
        for index in range(WARM_UP + options.steps):
            started = time.perf_counter()
            await session.step(hidden)
            if index >= WARM_UP:
                whole.append(time.perf_counter() - started - session.last_trace[0].compute_s)
                hops.append(session.last_trace[0])
    await session.close()
    print("| one token, less compute | median, ms | p99, ms | of the echo | of the simplest server |")
    print("|---|---|---|---|---|")
    base, floor = statistics.median(trips), statistics.median(floors)
    for name, samples in (
        ("echo, plain trio socket", trips),
        ("simplest server, plain trio socket", floors),
        ("hop: round trip", [hop.round_trip_s - hop.compute_s for hop in hops]),
        ("`session.step`", whole),
    ):
        median, p99 = statistics.median(samples), statistics.quantiles(samples, n=100)[98]
        print(f"| {name} | {1e3 * median:.3f} | {1e3 * p99:.2f} | {median / base:.2f} | {median / floor:.2f} |")
    parts = ", ".join(f"{part} {1e3 * statistics.median(hop.parts()[part] for hop in hops):.3f}" for part in PARTS)
    print(f"\nA hop taken apart, median ms: {parts} ({len(hops)} samples).\n", flush=True)


# -- sessions ----------------------------------------------------------------------------------------------------------


async def opening(client: ModelClient, echo: int, options: argparse.Namespace) -> None:
    """The table of opening a session."""
    opened: list[float] = []
    connected: list[float] = []
    size = 4 * client.checkpoint.hidden_size
    for index in range(WARM_UP + options.steps):
        started = time.perf_counter()
        session = await client.open_session(client.blocks, 1, 128)
        if index >= WARM_UP:
            opened.append(time.perf_counter() - started)
        await session.close()
        started = time.perf_counter()
        async with await trio.open_tcp_stream("127.0.0.1", echo) as stream:
            await plain_step(stream, bytes(size))
            if index >= WARM_UP:
                connected.append(time.perf_counter() - started)
    print("| opening | median, ms | p99, ms | ratio |\n|---|---|---|---|")
    base = statistics.median(connected)
    for name, samples in (("a plain trio socket, and an echo", connected), ("a session, warm connection", opened)):
        median, p99 = statistics.median(samples), statistics.quantiles(samples, n=100)[98]
        print(f"| {name} | {1e3 * median:.2f} | {1e3 * p99:.2f} | {median / base:.2f} |")
    print(flush=True)


async def many(client: ModelClient, options: argparse.Namespace) -> None:
    """A hundred sessions at once, against one alone."""
    hidden = torch.randn(1, 1, client.checkpoint.hidden_size)
    count = max(10, options.steps // 10)

    async def use(session: RemoteSession, times: list[float]) -> None:
        for _ in range(count):
            started = time.perf_counter()
            await session.step(hidden)
            times.append(time.perf_counter() - started)
        await session.close()

    alone: list[float] = []
    await use(await client.open_session(client.blocks, 1, count), alone)
    sessions: list[RemoteSession] = []

    async def open_one() -> None:
        sessions.append(await client.open_session(client.blocks, 1, count))

    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(MANY):
            nursery.start_soon(open_one)
    opened_s = time.perf_counter() - started
    connections = {id(session.hops[0].messages.stream.connection) for session in sessions}  # type: ignore[attr-defined]
    times: list[float] = []
    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for session in sessions:
            nursery.start_soon(use, session, times)
    took = time.perf_counter() - started
    rate, single = len(times) / took, 1 / statistics.median(alone)
    median, p99 = 1e3 * statistics.median(times), 1e3 * statistics.quantiles(times, n=100)[98]
    print(f"{len(sessions)} sessions on {len(connections)} connection, opened together in {1e3 * opened_s:.0f} ms: "
          f"{len(times)} steps, none failed; {rate:.0f} steps/s together, {rate / single:.1f} times one session's; "
          f"step {median:.1f} ms median, {p99:.1f} ms p99, alone {1e3 / single:.1f} ms.\n", flush=True)  # fmt: skip


# -- large tensors -----------------------------------------------------------------------------------------------------


async def take_tensors() -> None:
    """A process that takes tensors over our transport, whole and checked as a server does, and bytes over plain trio
    sockets; acknowledges each."""

    async def take(stream: ByteStream) -> None:
        messages = MessageStream(stream, max_message_bytes=1024)
        while (header := await messages.read_message()) is not None:
            said = pb.Tensor.FromString(header)
            payload = await messages.read_payload(check_header(said, name="hidden", shape=LARGE))
            decode_tensor(said, payload)
            await messages.write_message(b"k")

    async def swallow(stream: trio.SocketStream) -> None:
        left = LARGE_BYTES
        while piece := await stream.receive_some(1 << 20):
            left -= len(piece)
            if not left:
                await stream.send_all(b"k")
                left = LARGE_BYTES

    async with open_host(create_new_key_pair(), HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))) as host:
        host.set_handler(TENSORS, take)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        print(listeners[0].socket.getsockname()[1], host.addrs[0], flush=True)
        await trio.serve_listeners(swallow, listeners)


async def large(address: str, model: str | None, port: int, taker: str, options: argparse.Namespace) -> None:
    """The table of large tensors."""
    tensor = torch.randn(LARGE)
    seconds: dict[str, list[float]] = {}
    config = PeerConfig(initial_peers=(address,), model=model)
    async with (
        open_peer(config, progress=lambda _: None) as peer,
        open_host(create_new_key_pair(), HostConfig(listen=())) as host,
    ):
        plain = await trio.open_tcp_stream("127.0.0.1", port)
        stream = await host.open_stream(await host.connect(taker), TENSORS)
        messages = MessageStream(stream, max_message_bytes=1024)
        client = await peer.client()
        await client.ready()
        chain = client.chain()

        async def send_plain() -> float:
            started = time.perf_counter()
            await plain.send_all(tensor.view(-1).view(torch.uint8).numpy().data)
            await receive(plain, 1)
            return time.perf_counter() - started

        async def send_ours() -> float:
            started = time.perf_counter()
            header, pieces = encode_tensor(tensor)
            await messages.write_message(header.SerializeToString(), *pieces)
            assert await messages.read_message() == b"k"
            return time.perf_counter() - started

        async def forward() -> float:
            started = time.perf_counter()
            await client.portal.run_sync(chain.forward, tensor)
            return time.perf_counter() - started

        async def step() -> float:
            session = await client.open_session(client.blocks, *LARGE[:2])
            started = time.perf_counter()
            await session.step(tensor)
            took = time.perf_counter() - started - session.last_trace[0].compute_s
            await session.close()
            return took

        ways: dict[str, tuple[int, Callable[[], Awaitable[float]]]] = {
            "plain trio socket, one way": (1, send_plain),
            "tensor to tensor between two peers, one way": (1, send_ours),
            "a forward pass at a server, there and back, compute included": (2, forward),
            "a prompt at a server, less compute, there and back, signed": (2, step),
        }
        for index in range(2 + 2 * options.rounds):
            for name, (_, run) in ways.items():
                took = await run()
                seconds.setdefault(name, [])
                seconds[name] += [took] if index >= 2 else []
    print(f"Tensors of {LARGE_BYTES / 1e6:.1f} MB:\n")
    print("| large tensors | MB/s, median (min - max) | ratio |\n|---|---|---|")
    base = 0.0
    for name, (ways_bytes, _) in ways.items():
        rates = [ways_bytes * LARGE_BYTES / 1e6 / took for took in seconds[name]]
        base = base or statistics.median(rates)
        print(f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,.0f} - {max(rates):,.0f}) | "
              f"{statistics.median(rates) / base:.2f} |")  # fmt: skip


# -- all of it ---------------------------------------------------------------------------------------------------------


async def measure(address: str, model: str | None, echo: int, simple: int, options: argparse.Namespace) -> None:
    """What needs blocks that compute."""
    async with open_peer(PeerConfig(initial_peers=(address,), model=model), progress=lambda _: None) as peer:
        client = await peer.client()
        await client.ready()
        if "steps" in options.only:
            await steps(client, echo, simple, options)
        if "open" in options.only:
            await opening(client, echo, options)
        if "many" in options.only:
            await many(client, options)


def main() -> None:
    """Start the processes and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2x1024")
    parser.add_argument("--refer", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--take", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.take:
        trio.run(take_tensors)
    elif options.refer:
        trio.run(refer, int(options.refer[0]), *options.refer[1:])
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Run and print."""
    print(f"{options.shape}, float32, servers of 1 thread, {options.rounds} rounds of {options.steps} steps, "
          f"torch {torch.__version__}\n", flush=True)  # fmt: skip
    if set(options.only) - {"large"}:
        with model_of(options.shape) as model:
            checkpoint = open_checkpoint(model)
            name = [model] if model else []
            size = str(4 * checkpoint.hidden_size)
            with (
                reference("--refer", size) as (echo, *_),
                reference("--refer", size, str(checkpoint.directory)) as (simple, *_),
                server(*name, "--serve", f"0:{checkpoint.num_blocks}", threads=1) as address,
            ):
                trio.run(measure, address, model, int(echo), int(simple), options)
    if "large" in options.only:
        with model_of("llama-thin") as model, reference("--take") as (port, taker):
            assert model is not None
            with server(model, "--serve", "0:1", threads=1) as address:
                trio.run(large, address, model, int(port), taker, options)


if __name__ == "__main__":
    main()
