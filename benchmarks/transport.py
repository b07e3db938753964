"""How fast streams are: raw trio TCP, raw trio TLS, py-libp2p's own stack, and ours.

    python benchmarks/transport.py              all stacks, two processes, interleaved rounds; a Markdown table
    python benchmarks/transport.py --profile    what one 28 KB round trip costs: wake-ups, locks, Python calls

Every stack is measured in every round, one after the other, so that a machine that slows down slows all of them; a cell
is the median over the rounds, the spread in brackets the smallest and the largest round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import ssl
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from libp2p.crypto.ed25519 import create_new_key_pair

from petals.peer.base.config import RelayLimits
from petals.peer.net.host import Host, HostConfig, open_host
from petals.peer.net.wire.pnet import SwarmKey
from petals.protocols.stream import ByteStream

STACKS = ("tcp", "tls", "stock", "petals", "relayed", "private")
NAMES = {
    "tcp": "raw trio TCP",
    "tls": "raw trio TLS",
    "stock": "py-libp2p's own",
    "petals": "ours",
    "relayed": "ours, through a relay",
    "private": "ours, swarm key",
}
PROTOCOL = "/bench/1"
SIZES = {"64 B": 64, "8 KB": 8 << 10, "28 KB": 28 << 10, "256 KB": 256 << 10}
ONE_WAY_BYTES = 64 << 20
ONE_WAY_FLAG = 1 << 63
PIECE = 1 << 20


class Stream(Protocol):
    async def read(self, max_bytes: int) -> bytes | bytearray | memoryview: ...
    async def write(self, data: bytes) -> None: ...
    async def close(self) -> None: ...


class RawStream:
    """trio's own streams with the three calls used here."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))  # type: ignore[attr-defined]

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def close(self) -> None:
        await self._stream.aclose()


async def read_exactly(stream: Stream, n: int) -> bytearray:
    data = bytearray()
    while len(data) < n:
        piece = await stream.read(min(n - len(data), PIECE))
        if not piece:
            raise EOFError
        data += piece
    return data


async def serve_stream(stream: Stream) -> None:
    """Eight bytes of length, then so many bytes come; they go back, or (flag set) are swallowed and acknowledged."""
    try:
        while True:
            word = int.from_bytes(await read_exactly(stream, 8), "big")
            size = word & (ONE_WAY_FLAG - 1)
            if word & ONE_WAY_FLAG:
                left = size
                while left:
                    left -= len(await stream.read(min(left, PIECE)))
                await stream.write(b"k")
            else:
                await stream.write(await read_exactly(stream, size))  # type: ignore[arg-type]
    except (EOFError, trio.BrokenResourceError):
        return


async def round_trip(stream: Stream, size: int, payload: bytes) -> None:
    await stream.write(size.to_bytes(8, "big") + payload[:size])
    assert len(await read_exactly(stream, size)) == size


async def one_way(stream: Stream, size: int, payload: bytes) -> None:
    await stream.write((size | ONE_WAY_FLAG).to_bytes(8, "big"))
    for _ in range(size // PIECE):
        await stream.write(payload[:PIECE])
    await read_exactly(stream, 1)


# -- the two ends of each stack --------------------------------------------------------------------------------------


def make_certificate(folder: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def config_of(stack: str, *, listen: bool) -> HostConfig:
    return HostConfig(
        listen=("/ip4/127.0.0.1/tcp/0",) if listen else (),
        transport="stock" if stack == "stock" else "petals",
        swarm_key=SwarmKey(bytes(range(32))) if stack == "private" else None,
    )


async def serve(stack: str, certificate: str, relay: str) -> None:
    """The server process: prints where it is, serves until it is killed."""
    if stack == "relay":
        async with open_host(create_new_key_pair(), HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))) as host:
            host.traversal.start_relaying(RelayLimits(), lambda: host.addrs)
            print(json.dumps(host.addrs[0]), flush=True)
            await trio.sleep_forever()
    if stack in ("tcp", "tls"):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)

        async def handle(stream: trio.SocketStream) -> None:
            secured: trio.abc.Stream = trio.SSLStream(stream, context, server_side=True) if stack == "tls" else stream
            await serve_stream(RawStream(secured))

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        print(json.dumps(listeners[0].socket.getsockname()[1]), flush=True)
        await trio.serve_listeners(handle, listeners)
    async with open_host(create_new_key_pair(), config_of(stack, listen=not relay)) as host:

        async def handle_stream(stream: ByteStream) -> None:
            await serve_stream(stream)

        host.set_handler(PROTOCOL, handle_stream)
        if relay:
            await host.traversal.reserve(await host.connect(relay))
        print(json.dumps(host.addrs[0]), flush=True)
        await trio.sleep_forever()


class Client:
    """One stack's client: `open` a stream, `reconnect` from nothing."""

    open: Callable[[], Awaitable[Stream]]
    reconnect: Callable[[], Awaitable[None]]


@asynccontextmanager
async def client_of(stack: str, address: Any, certificate: str) -> AsyncIterator[Client]:
    client = Client()
    if stack in ("tcp", "tls"):
        context = ssl.create_default_context(cafile=certificate)

        async def connect() -> Stream:
            stream: trio.abc.Stream = await trio.open_tcp_stream("127.0.0.1", address)
            if stack == "tls":
                assert isinstance(stream, trio.SocketStream)
                stream = trio.SSLStream(stream, context, server_hostname="localhost")
                await stream.do_handshake()
            return RawStream(stream)

        async def reconnect() -> None:
            await (await connect()).close()

        client.open, client.reconnect = connect, reconnect
        yield client
        return
    async with open_host(create_new_key_pair(), config_of(stack, listen=False)) as host:
        peer_id = await host.connect(address)

        async def fresh() -> None:
            async with open_host(keys, config_of(stack, listen=False)) as other:
                nonlocal connect_s
                started = perf_counter()
                await other.connect(address)
                connect_s = perf_counter() - started

        async def open_stream() -> Stream:
            return await host.open_stream(peer_id, PROTOCOL)

        keys, connect_s = create_new_key_pair(), 0.0
        client.open, client.reconnect = open_stream, fresh
        client.connect_s = lambda: connect_s  # type: ignore[attr-defined]
        yield client


# -- measuring -------------------------------------------------------------------------------------------------------


async def measure(client: Client, scale: float) -> dict[str, float]:
    """One round of one stack: name of the figure -> milliseconds (MB/s for the rate)."""
    payload = bytes(PIECE)
    figures: dict[str, float] = {}
    stream = await client.open()
    for name, size in SIZES.items():
        for _ in range(20):
            await round_trip(stream, size, payload)
        samples = []
        for _ in range(max(20, int((400 if size < 1 << 17 else 100) * scale))):
            started = perf_counter()
            await round_trip(stream, size, payload)
            samples.append(perf_counter() - started)
        figures[f"{name} round trip, ms"] = statistics.median(samples) * 1000
    await one_way(stream, ONE_WAY_BYTES // 8, payload)
    samples = []
    for _ in range(max(3, int(7 * scale))):
        started = perf_counter()
        await one_way(stream, ONE_WAY_BYTES, payload)
        samples.append(ONE_WAY_BYTES / 1e6 / (perf_counter() - started))
    figures["one way, MB/s"] = statistics.median(samples)
    await stream.close()

    samples = []
    for _ in range(max(10, int(60 * scale))):
        started = perf_counter()
        stream = await client.open()
        await round_trip(stream, 64, payload)
        samples.append(perf_counter() - started)
        await stream.close()
    figures["new stream + request, ms"] = statistics.median(samples) * 1000

    samples = []
    for _ in range(max(5, int(15 * scale))):
        started = perf_counter()
        await client.reconnect()
        samples.append(client.connect_s() if hasattr(client, "connect_s") else perf_counter() - started)
    figures["connect, ms"] = statistics.median(samples) * 1000

    async def one() -> None:
        stream = await client.open()
        await round_trip(stream, 8 << 10, payload)
        await stream.close()

    started = perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(one)
    figures["100 streams at once, ms"] = (perf_counter() - started) * 1000
    return figures


@asynccontextmanager
async def server_of(stack: str, certificate: str, relay: str = "") -> AsyncIterator[Any]:
    if stack == "relayed" and not relay:
        async with server_of("relay", certificate) as middle, server_of(stack, certificate, middle) as address:
            yield address
        return
    command = [sys.executable, __file__, "--serve", stack, "--certificate", certificate, "--relay", relay]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            line += await process.stdout.receive_some(1000)
        yield json.loads(line)
    finally:
        process.kill()
        await process.wait()


async def compare(rounds: int, scale: float, certificate: str) -> dict[str, dict[str, list[float]]]:
    table: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for stack in STACKS:
            async with server_of(stack, certificate) as address, client_of(stack, address, certificate) as client:
                for name, value in (await measure(client, scale)).items():
                    table.setdefault(name, {}).setdefault(stack, []).append(value)
            print(f"round {number + 1} of {rounds}: {NAMES[stack]} done", file=sys.stderr)
    return table


def show(table: dict[str, dict[str, list[float]]]) -> None:
    ratios = " | ".join(("ours : stock", "ours : TLS", "relayed : ours", "key : none"))
    print("| | " + " | ".join(NAMES[stack] for stack in STACKS) + f" | {ratios} |")
    print("|---" * (len(STACKS) + 5) + "|")
    for name, row in table.items():
        cells = [
            f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"
            for values in (row[stack] for stack in STACKS)
        ]
        pairs = (("petals", "stock"), ("petals", "tls"), ("relayed", "petals"), ("private", "petals"))
        cells += [ratio(row[one], row[other]) for one, other in pairs]
        print(f"| {name} | " + " | ".join(cells) + " |")


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Round by round, since a round's stacks were measured next to each other."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


# -- the profile -----------------------------------------------------------------------------------------------------


class Steps(trio.abc.Instrument):
    """Counts how often a task is woken."""

    def __init__(self) -> None:
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1


async def profile(stack: str, certificate: str) -> dict[str, float]:
    """Both ends in one process, so that both are counted; per 28 KB round trip."""
    payload, n = bytes(PIECE), 200
    locks = calls = 0
    acquire = trio.Lock.acquire

    async def counting(self: trio.Lock) -> None:
        nonlocal locks
        locks += 1
        await acquire(self)

    def on_call(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    async with (
        open_host(create_new_key_pair(), config_of(stack, listen=True)) as server,
        open_host(create_new_key_pair(), config_of(stack, listen=False)) as client,
    ):
        server.set_handler(PROTOCOL, serve_stream)
        stream = await open_between(client, server)
        for _ in range(50):
            await round_trip(stream, 28 << 10, payload)
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        trio.Lock.acquire = counting  # type: ignore[assignment, method-assign]
        started = perf_counter()
        for _ in range(n):
            await round_trip(stream, 28 << 10, payload)
        elapsed = perf_counter() - started
        trio.Lock.acquire = acquire  # type: ignore[method-assign]
        trio.lowlevel.remove_instrument(steps)
        sys.setprofile(on_call)
        for _ in range(n):
            await round_trip(stream, 28 << 10, payload)
        sys.setprofile(None)
        await stream.close()
    return {
        "wake-ups": steps.count / n,
        "locks taken": locks / n,
        "Python calls": calls / n,
        "ms (one process)": elapsed / n * 1000,
    }


async def open_between(client: Host, server: Host) -> ByteStream:
    await client.connect(server.addrs[0])
    return await client.open_stream(server.peer_id, PROTOCOL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="fewer (or more) samples per round")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path, help="write all rounds there")
    parser.add_argument("--serve", choices=(*STACKS, "relay"), help=argparse.SUPPRESS)
    parser.add_argument("--relay", default="", help=argparse.SUPPRESS)
    parser.add_argument("--certificate", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    if arguments.serve:
        trio.run(serve, arguments.serve, arguments.certificate, arguments.relay)
        return
    with tempfile.TemporaryDirectory() as folder:
        certificate = str(make_certificate(Path(folder)))
        if arguments.profile:
            figures = {stack: trio.run(profile, stack, certificate) for stack in ("stock", "petals")}
            print("| per 28 KB round trip | py-libp2p's own | ours |\n|---|---|---|")
            for name in figures["petals"]:
                print(f"| {name} | {figures['stock'][name]:.3g} | {figures['petals'][name]:.3g} |")
            return
        table = trio.run(compare, arguments.rounds, arguments.scale, certificate)
        show(table)
        if arguments.json:
            arguments.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
