"""Foreign libp2p peers for the tests: fetched once into a cache outside the repository, pinned by hash, then driven.

The cache is $PETALS_INTEROP_CACHE, or a folder of the tests' own (tests/surroundings.py). What is missing (Node, npm,
another platform than x86-64 Linux for go's daemon, a network on the first run) skips the tests; with
PETALS_INTEROP=required it fails them. Each is installed whole or not at all, by one process while others wait, and
again when files of it are gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.models.source.disk import make_whole
from petals.protocols.framing import encode_frame, encode_varint
from tests.surroundings import CACHE, NO_NETWORK

HERE = Path(__file__).parent
ECHO, RESET, PING = "/test/echo/1", "/test/reset/1", "/ipfs/ping/1.0.0"
MIB = 1 << 20


COMPLETE = "complete.json"
"""Lists the files of an installation, with their sizes."""


def cache() -> Path:
    chosen = os.environ.get("PETALS_INTEROP_CACHE")
    return Path(chosen) if chosen else CACHE / "interop"


def missing(what: str) -> NoReturn:
    if os.environ.get("PETALS_INTEROP") == "required":
        pytest.fail(what)
    pytest.skip(what)


def fetch(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        missing(f"{NO_NETWORK}: {command[0]} brings nothing: {done.stderr.strip()[-300:]}")


def install(goal: Path, make: Callable[[Path], None]) -> Path:
    """`goal`, filled by `make` unless it is there with all files that it had."""

    def made(room: Path) -> None:
        make(room)
        (room / COMPLETE).write_text(json.dumps(sizes(room)))

    make_whole(goal, is_installed, made)
    return goal


def is_installed(goal: Path) -> bool:
    try:
        return sizes(goal) == (json.loads((goal / COMPLETE).read_bytes()) or None)
    except (OSError, ValueError):
        return False


def sizes(folder: Path) -> dict[str, int]:
    """All files in a folder and below it, but the list itself."""
    found = ((file.relative_to(folder).as_posix(), file.lstat().st_size) for file in folder.rglob("*") if is_file(file))
    return {name: size for name, size in sorted(found) if name != COMPLETE}


def is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def install_js() -> Path:
    """js-libp2p from npm, exactly as package-lock.json says (versions and hashes), no install scripts run."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        missing("js-libp2p needs Node 20 or later, and npm")
    sources = [HERE / "js" / name for name in ("package.json", "package-lock.json", "peer.mjs", "inference.mjs")]
    sign = hashlib.sha256(b"".join(source.read_bytes() for source in sources))

    def make(room: Path) -> None:
        for source in sources:
            shutil.copy(source, room)
        fetch(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], room)

    return install(cache() / f"js-{sign.hexdigest()[:16]}", make) / "peer.mjs"


def install_go() -> Path:
    """go-libp2p's daemon out of the hivemind wheel; nothing else of the wheel is used or run."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        missing("the wheel carries go-libp2p's daemon for x86-64 Linux only")
    wanted = HERE / "p2pd.txt"

    def make(room: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            fetch(
                [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes",
                 "-d", folder, "-r", str(wanted)],
                HERE,
            )  # fmt: skip
            (wheel,) = Path(folder).glob("hivemind-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (room / "p2pd").write_bytes(archive.read("hivemind/hivemind_cli/p2pd"))
        (room / "p2pd").chmod(0o755)

    return install(cache() / f"go-{hashlib.sha256(wanted.read_bytes()).hexdigest()[:16]}", make) / "p2pd"


class JsPeer:
    """js-libp2p in a Node process: one JSON line in, one out."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._buffer = b""

    async def line(self) -> object:
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            piece = await self._process.stdout.receive_some(65536)
            assert piece, "the Node process ended"
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    async def dial(self, command: str, addr: str, argument: object = None) -> object:
        """Have it dial `addr` and do what `command` says; what came of it, True as a rule, or an error's text."""
        assert self._process.stdin is not None
        words = {"command": command, "addr": addr, "argument": argument}
        await self._process.stdin.send_all(json.dumps(words).encode() + b"\n")
        return await self.line()


@asynccontextmanager
async def js_peer(
    swarm_key: bytes = b"", relay: str = "", kademlia: str = ""
) -> AsyncIterator[tuple[str, Callable[..., object]]]:
    """
    Args:
        swarm_key: a key file's content, for a private network.
        relay: where it takes calls, and nowhere else; "none": it is a relay itself.
        kademlia: if not empty, it is a node of the directory.
    """
    script = install_js()
    environment = {**os.environ, "SWARM_KEY": swarm_key.decode(), "RELAY": relay, "KADEMLIA": kademlia}
    process = await trio.lowlevel.open_process(
        ["node", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=script.parent, env=environment
    )
    try:
        peer = JsPeer(process)
        addr = await peer.line()
        assert isinstance(addr, str)
        yield addr, peer.dial
    finally:
        process.kill()
        await process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            await pipe.aclose()


# -- go-libp2p's daemon ----------------------------------------------------------------------------------------------
# Its control protocol is protobuf over a unix socket (p2pd.proto of the wheel); the six messages used are built here.

UNIX_CODE = 400
IDENTIFY, CONNECT, STREAM_OPEN, STREAM_HANDLER, DHT = range(5)
FIND_PROVIDERS, PROVIDE = 2, 8
DHT_BEGIN, DHT_END = 0, 2
RAW_CID = b"\x01\x55"
DHT_TIMEOUT_S = 20


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return encode_varint(number << 3) + encode_varint(value)
    return encode_varint(number << 3 | 2) + encode_frame(value)


def parse(message: bytes) -> dict[int, list[int | bytes]]:
    fields: dict[int, list[int | bytes]] = {}
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(message):
        key = varint()
        if key & 7:
            size = varint()
            fields.setdefault(key >> 3, []).append(message[position : position + size])
            position += size
        else:
            fields.setdefault(key >> 3, []).append(varint())
    return fields


class GoPeer:
    """go-libp2p's daemon: each stream is a unix socket of ours."""

    def __init__(self, control: Path) -> None:
        self._control = control

    async def call(self, request: bytes) -> tuple[dict[int, list[int | bytes]], trio.SocketStream]:
        stream = await trio.open_unix_socket(self._control)
        try:
            await stream.send_all(encode_frame(request))
            reply = parse(await read_frame(stream))
            assert reply[1] == [0], f"the daemon says {reply}"
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return reply, stream

    async def addr(self) -> str:
        reply, stream = await self.call(field(1, IDENTIFY))
        await stream.aclose()
        (identity,) = reply[4]
        assert isinstance(identity, bytes)
        fields = parse(identity)
        return f"{Multiaddr(fields[2][0])}/p2p/{ID(fields[1][0])}"  # type: ignore[arg-type]

    async def handle(self, protocol: str, listening: Path) -> None:
        where = encode_varint(UNIX_CODE) + encode_frame(bytes(listening))  # py-multiaddr drops the leading slash
        _, stream = await self.call(
            field(1, STREAM_HANDLER) + field(4, field(1, where) + field(2, protocol.encode()) + field(3, 0))
        )
        await stream.aclose()

    async def open(self, addr: str, protocol: str) -> trio.SocketStream:
        await self.connect(addr)
        peer = ID.from_base58(Multiaddr(addr).get_peer_id()).to_bytes()
        _, stream = await self.call(field(1, STREAM_OPEN) + field(3, field(1, peer) + field(2, protocol.encode())))
        return stream

    async def connect(self, addr: str) -> None:
        full = Multiaddr(addr)
        peer = ID.from_base58(full.get_peer_id()).to_bytes()
        where = full.decapsulate(Multiaddr(f"/p2p/{full.get_peer_id()}")).to_bytes()
        _, stream = await self.call(field(1, CONNECT) + field(2, field(1, peer) + field(2, where)))
        await stream.aclose()

    async def ask_directory(self, kind: int, fields: bytes) -> list[dict[int, list[int | bytes]]]:
        """The answers of go's Kademlia: one, or all of a search. Raises AssertionError with its error."""
        fields = field(1, kind) + fields + field(7, DHT_TIMEOUT_S)
        reply, stream = await self.call(field(1, DHT) + field(5, fields))
        answers = [parse(each) for each in reply.get(5, []) if isinstance(each, bytes)]
        if answers and answers[0][1] == [DHT_BEGIN]:
            answers.clear()
            while (answer := parse(await read_frame(stream)))[1] != [DHT_END]:
                answers.append(answer)
        await stream.aclose()
        return answers

    async def providers(self, key: str) -> list[str]:
        """Peer IDs of whom go finds under a content key (a multihash in hex)."""
        fields = field(3, RAW_CID + bytes.fromhex(key)) + field(6, 20)
        named = [answer[2][0] for answer in await self.ask_directory(FIND_PROVIDERS, fields)]
        return [str(ID(parse(each)[1][0])) for each in named]  # type: ignore[arg-type]

    async def provide(self, key: str) -> None:
        """Have go say that it provides a content key."""
        await self.ask_directory(PROVIDE, field(3, RAW_CID + bytes.fromhex(key)))

    async def dial(self, command: str, addr: str) -> object:
        if command == "ping":
            stream = await self.open(addr, PING)
            await stream.send_all(bytes(range(32)))
            answer = await read_exactly(stream, 32)
            await stream.aclose()
            return answer == bytes(range(32))
        if command == "reset":
            stream = await self.open(addr, RESET)
            await stream.send_all(b"x")
            rest = await read_all(stream)
            await stream.aclose()
            return rest == b""
        if command == "echo":
            return await self.ask(addr, 16 * MIB)
        results: list[bool] = []
        async with trio.open_nursery() as nursery:
            for _ in range(100):

                async def one() -> None:
                    results.append(await self.ask(addr, 50_000))

                nursery.start_soon(one)
        return all(results) and len(results) == 100

    async def ask(self, addr: str, size: int) -> bool:
        stream = await self.open(addr, ECHO)
        data = os.urandom(size)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            answer = await read_exactly(stream, size)  # the daemon knows no half-close: either end ends both
        await stream.aclose()
        return answer == data


async def read_frame(stream: trio.SocketStream) -> bytes:
    size = shift = 0
    while True:
        (byte,) = await read_exactly(stream, 1)
        size |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return await read_exactly(stream, size)


async def read_exactly(stream: trio.SocketStream, n: int) -> bytes:
    data = bytearray()
    while len(data) < n:
        piece = await stream.receive_some(n - len(data))
        assert piece, "ended early"
        data += piece
    return bytes(data)


async def read_all(stream: trio.SocketStream) -> bytes:
    data = bytearray()
    while piece := await stream.receive_some(MIB):
        data += piece
    return bytes(data)


@asynccontextmanager
async def go_peer(folder: Path, *flags: str) -> AsyncIterator[tuple[str, GoPeer]]:
    daemon = install_go()
    control = folder / "control.sock"
    process = await trio.lowlevel.open_process(
        [str(daemon), "-listen", f"/unix{control}", "-hostAddrs", "/ip4/127.0.0.1/tcp/0", "-q",
         "-tls=false", "-quic=false", *(flags or ["-relay=false"])],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with trio.fail_after(30):
            while not await answers(control):  # noqa: ASYNC110 - another process
                await trio.sleep(0.01)
        peer = GoPeer(control)
        async with trio.open_nursery() as nursery:
            for protocol, answer in ((ECHO, answer_echo), (RESET, answer_reset)):
                path = folder / (protocol.split("/")[2] + ".sock")
                listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                await listener.bind(str(path))
                listener.listen(200)
                nursery.start_soon(trio.serve_listeners, answer, [trio.SocketListener(listener)])
                await peer.handle(protocol, path)
            yield await peer.addr(), peer
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        await process.wait()


async def answers(control: Path) -> bool:
    """Whether the daemon listens already: the socket is there a moment earlier."""
    try:
        await (await trio.open_unix_socket(control)).aclose()
    except OSError:
        return False
    return True


async def answer_echo(stream: trio.SocketStream) -> None:
    await read_frame(stream)  # who calls
    while piece := await stream.receive_some(MIB):
        await stream.send_all(piece)


async def answer_reset(stream: trio.SocketStream) -> None:
    await read_frame(stream)
    await stream.receive_some(1)
