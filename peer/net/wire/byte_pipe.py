"""What carries a connection's bytes: a TCP socket as a rule, a circuit through a relay, any libp2p raw connection."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from typing import Protocol

import trio
from libp2p.abc import IRawConnection
from libp2p.exceptions import BaseLibp2pError

from petals.peer.net.wire.circuit import CircuitConn

_UNSENT_BYTES = 256 * 1024
"""What the kernel may hold unsent. Its own limit is megabytes, behind which a ping or a small step would queue."""

_MAX_PIECES = 1024
"""POSIX promises 16 pieces per call (IOV_MAX); Linux and macOS take 1,024."""


class Pipe(Protocol):
    """A byte stream with one reader and one writer. All methods raise OSError or trio.BrokenResourceError when it
    breaks and trio.ClosedResourceError when this end has closed it."""

    async def receive_into(self, buffer: memoryview) -> int:
        """At least one byte into `buffer`; 0 at the end."""
        ...

    def try_send(self, pieces: Sequence[bytes | memoryview]) -> int:
        """As much of `pieces`, one after the other, as goes without waiting; returns that number of bytes. What is left
        is what must be sent next."""
        ...

    async def send_all(self, data: bytes | bytearray | memoryview) -> None: ...

    async def send_eof(self) -> None:
        """Say that no more bytes follow, where the carrier can say so."""
        ...

    async def aclose(self) -> None: ...


class TcpPipe:
    """A connected TCP socket. Reads and writes go to the descriptor: trio's own calls pass through a checkpoint and a
    conflict detector each time, and one reader and one writer per connection need neither."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        if sys.platform == "linux":
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)

    async def receive_into(self, buffer: memoryview) -> int:
        while True:
            await trio.lowlevel.wait_readable(self._checked_fd())
            try:
                return os.readv(self._checked_fd(), [buffer])
            except BlockingIOError:
                pass

    def try_send(self, pieces: Sequence[bytes | memoryview]) -> int:
        try:
            return os.writev(self._checked_fd(), pieces[:_MAX_PIECES])
        except BlockingIOError:
            return 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        while view:
            await trio.lowlevel.wait_writable(self._checked_fd())
            view = view[self.try_send([view]) :]

    async def send_eof(self) -> None:
        self._checked_fd()
        self._stream.socket.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        await self._stream.aclose()

    def _checked_fd(self) -> int:
        fd = self._stream.socket.fileno()
        if fd < 0:
            raise trio.ClosedResourceError
        return fd


class PortableTcpPipe:
    """The same where descriptors can not be read and written directly: on Windows sockets are no files, and nothing
    scatters or gathers. trio's own calls are slower for many small messages; nothing goes out without an await."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def receive_into(self, buffer: memoryview) -> int:
        data = await self._stream.receive_some(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def try_send(self, pieces: Sequence[bytes | memoryview]) -> int:
        return 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(memoryview(data))

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


def tcp_pipe(stream: trio.SocketStream) -> TcpPipe | PortableTcpPipe:
    """The fastest that this system has."""
    return TcpPipe(stream) if hasattr(os, "readv") and hasattr(os, "writev") else PortableTcpPipe(stream)


class CircuitPipe:
    """A circuit through a relay. Its stream's window is the back-pressure; nothing goes out without an await."""

    def __init__(self, circuit: CircuitConn) -> None:
        self._circuit = circuit

    async def receive_into(self, buffer: memoryview) -> int:
        data = await self._circuit.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def try_send(self, pieces: Sequence[bytes | memoryview]) -> int:
        return 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._circuit.write(data)

    async def send_eof(self) -> None:
        await self._circuit.end_write()

    async def aclose(self) -> None:
        await self._circuit.close()


class RawPipe:
    """Any other libp2p raw connection."""

    def __init__(self, connection: IRawConnection) -> None:
        self._connection = connection

    async def receive_into(self, buffer: memoryview) -> int:
        try:
            data = await self._connection.read(len(buffer))
        except EOFError:
            return 0
        except BaseLibp2pError as error:
            raise trio.BrokenResourceError(str(error)) from error
        buffer[: len(data)] = data
        return len(data)

    def try_send(self, pieces: Sequence[bytes | memoryview]) -> int:
        return 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._connection.write(bytes(data))
        except BaseLibp2pError as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def send_eof(self) -> None:
        return None

    async def aclose(self) -> None:
        await self._connection.close()
