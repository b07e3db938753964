"""Direct connection upgrade through relay (libp2p specs, relay/DCUtR.md): both ends dial at the same moment.

Who was called over the relay begins: it asks for the caller's addresses and tells its own, measures the round trip,
says SYNC, waits half of that, and dials; the caller dials when SYNC comes. Each SYN opens the sender's own router for
the other's. Whatever comes of it, the caller is the client of the handshakes on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio
from google.protobuf.message import DecodeError
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.peer.net.wire.addresses import parse_addrs
from petals.protocols.errors import RemoteProtocolError
from petals.protocols.stream import MessageStream

DCUTR = "/libp2p/dcutr"
MAX_MESSAGE_BYTES = 16 << 10
MAX_ADDRS = 8


@dataclass(frozen=True, slots=True)
class Offer:
    """Where the other end may be, and how far away that is."""

    addrs: tuple[Multiaddr, ...]
    round_trip_s: float


async def begin(messages: MessageStream, addrs: Sequence[str]) -> Offer:
    """The called peer's side, up to SYNC, which is sent; dial half a round trip later."""
    started = trio.current_time()
    await _send(messages, HolePunch.CONNECT, addrs)
    theirs = await _receive(messages, HolePunch.CONNECT)
    round_trip_s = trio.current_time() - started
    await _send(messages, HolePunch.SYNC, ())
    return Offer(theirs, round_trip_s)


async def follow(messages: MessageStream, addrs: Sequence[str]) -> tuple[Multiaddr, ...]:
    """The caller's side; dial at once when it returns."""
    theirs = await _receive(messages, HolePunch.CONNECT)
    await _send(messages, HolePunch.CONNECT, addrs)
    await _receive(messages, HolePunch.SYNC)
    return theirs


async def _send(messages: MessageStream, kind: HolePunch.Type.ValueType, addrs: Sequence[str]) -> None:
    message = HolePunch(type=kind, ObsAddrs=[Multiaddr(addr).to_bytes() for addr in addrs[:MAX_ADDRS]])
    await messages.write_message(message.SerializeToString())


async def _receive(messages: MessageStream, kind: HolePunch.Type.ValueType) -> tuple[Multiaddr, ...]:
    data = await messages.read_message()
    try:
        message = HolePunch.FromString(data or b"")
    except DecodeError:
        raise RemoteProtocolError("a hole-punching message that does not decode", messages.remote_peer) from None
    if data is None or int(message.type) != int(kind):
        raise RemoteProtocolError("hole punching out of step", messages.remote_peer)
    return parse_addrs(message.ObsAddrs[:MAX_ADDRS])
