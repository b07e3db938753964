"""Circuit relay v2 as its users speak it (libp2p specs, relay/circuit-v2.md): reserve, connect, be connected to.

A private peer asks a relay to keep a place for it (RESERVE); from then on whoever asks that relay (CONNECT) gets a byte
stream to it, announced at its end by the relay (STOP). Both ends then treat that byte stream like a socket: Noise and
yamux run through it, so the relay sees ciphertext.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TypeVar

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.peer.net.wire.addresses import parse_addrs
from petals.protocols.errors import RemoteError, RemoteProtocolError, RequestRefused
from petals.protocols.stream import ByteStream, MessageStream

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"
MAX_MESSAGE_BYTES = 16 << 10
MAX_ADDRS = 16
M = TypeVar("M", HopMessage, StopMessage)
FADES_AT = 0.8
"""Of what a relay lets pass: from then on another circuit is looked for, before this one is cut."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """A place at a relay."""

    expires_at: float
    """Unix time, by the relay's clock."""
    addrs: tuple[str, ...]
    """Of the relay, as it names them, with /p2p/<relay>."""


@dataclass(frozen=True, slots=True)
class CircuitLimit:
    """What the relay lets pass through one circuit, both ways together; 0: no limit."""

    seconds: int = 0
    nbytes: int = 0


class CircuitConn(IRawConnection):
    """A circuit in the place of a socket.

    Args:
        addr: the relay's address with /p2p/<relay>/p2p-circuit.
    """

    def __init__(self, messages: MessageStream, addr: Multiaddr, *, is_initiator: bool, limit: CircuitLimit) -> None:
        self.is_initiator = is_initiator
        self._messages, self._addr, self._limit = messages, addr, limit
        self._opened_at = trio.current_time()
        self._passed = 0

    @property
    def is_fading(self) -> bool:
        """Whether the relay will cut it before long."""
        age = trio.current_time() - self._opened_at
        return bool(
            (self._limit.seconds and age > FADES_AT * self._limit.seconds)
            or (self._limit.nbytes and self._passed > FADES_AT * self._limit.nbytes)
        )

    async def read(self, n: int | None = None) -> bytes:
        """At least one byte, b"" at the end. Raises trio.BrokenResourceError."""
        try:
            data = await self._messages.read_some(n or 65536)
        except RemoteError as error:
            raise trio.BrokenResourceError(str(error)) from error
        self._passed += len(data)
        return data

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """All of `data`. Raises trio.BrokenResourceError."""
        try:
            await self._messages.stream.write(data)
        except RemoteError as error:
            raise trio.BrokenResourceError(str(error)) from error
        self._passed += len(data)

    async def end_write(self) -> None:
        """No more bytes follow."""
        await self._messages.close_write()

    async def close(self) -> None:
        await self._messages.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None

    def get_transport_addresses(self) -> list[Multiaddr]:
        return [self._addr]

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.RELAYED


async def reserve(stream: ByteStream) -> Reserved:
    """Ask the relay at the other end for a place; `stream` is closed then.

    Raises:
        RequestRefused: it has none for us. RemoteError: it broke, or speaks nonsense.
    """
    messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
    await messages.write_message(HopMessage(type=HopMessage.RESERVE).SerializeToString())
    reply = await _status(messages)
    await messages.close()
    if not reply.HasField("reservation"):
        raise RemoteProtocolError("a reservation without its terms", stream.remote_peer)
    addrs = parse_addrs(reply.reservation.addrs[:MAX_ADDRS])
    return Reserved(float(reply.reservation.expire), tuple(map(str, addrs)))


async def connect(stream: ByteStream, target: ID, addr: Multiaddr) -> CircuitConn:
    """A circuit to `target` through the relay at the other end of `stream`.

    Raises: as `reserve`; RequestRefused also when `target` has no place there.
    """
    messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
    request = HopMessage(type=HopMessage.CONNECT)
    request.peer.id = target.to_bytes()
    await messages.write_message(request.SerializeToString())
    reply = await _status(messages)
    limit = CircuitLimit(reply.limit.duration, reply.limit.data)
    return CircuitConn(messages, addr, is_initiator=True, limit=limit)


async def accept(stream: ByteStream, addr: Multiaddr) -> CircuitConn:
    """The circuit that the relay at the other end announces.

    Raises:
        RemoteProtocolError: it announces nothing.
    """
    messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
    request = _parse(StopMessage(), await messages.read_message(), stream)
    if request.type != StopMessage.CONNECT:
        raise RemoteProtocolError("a relay that announces no circuit", stream.remote_peer)
    reply = StopMessage(type=StopMessage.STATUS, status=Status.OK)
    await messages.write_message(reply.SerializeToString())
    limit = CircuitLimit(request.limit.duration, request.limit.data)
    return CircuitConn(messages, addr, is_initiator=False, limit=limit)


async def announce(stream: ByteStream, source: ID, limit: CircuitLimit) -> MessageStream:
    """The relay's side of `accept`: tell the peer at the other end who calls.

    Returns: the stream, on which the circuit's bytes follow.
    Raises:
        RequestRefused: it does not want the call. RemoteError: it broke, or speaks nonsense.
    """
    messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
    request = StopMessage(type=StopMessage.CONNECT)
    request.peer.id = source.to_bytes()
    request.limit.duration, request.limit.data = limit.seconds, limit.nbytes
    await messages.write_message(request.SerializeToString())
    reply = _parse(StopMessage(), await messages.read_message(), stream)
    if reply.type != StopMessage.STATUS or reply.status != Status.OK:
        raise RequestRefused(f"the called peer says {_name(reply.status)}", stream.remote_peer)
    return messages


async def _status(messages: MessageStream) -> HopMessage:
    reply = _parse(HopMessage(), await messages.read_message(), messages.stream)
    if reply.type != HopMessage.STATUS:
        raise RemoteProtocolError("a relay that answers with a question", messages.remote_peer)
    if reply.status != Status.OK:
        raise RequestRefused(f"relay …{messages.remote_peer[-6:]} says {_name(reply.status)}", messages.remote_peer)
    return reply


def _parse(message: M, data: bytes | None, stream: ByteStream) -> M:
    if data is None:
        raise RemoteProtocolError("the stream ended instead of an answer", stream.remote_peer)
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise RemoteProtocolError("a relay message that does not decode", stream.remote_peer) from None
    return message


def _name(status: int) -> str:
    return Status.Name(status) if status in Status.values() else f"status {status}"  # type: ignore[arg-type]


def expires_in(reserved: Reserved) -> float:
    """Seconds left; the relay's clock may be off, so not less than a minute nor more than a day."""
    return min(86400.0, max(60.0, reserved.expires_at - time.time()))
