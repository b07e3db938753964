"""AutoNAT v1 (libp2p specs, autonat/README.md): "dial me back and say whether it worked". Messages only.

py-libp2p's own (0.8.1) answers "reachable" for a port that nobody listens on: it asks its connection to the asker
whether there is one. Ours dials back with a socket of its own and wants the asker's Noise identity at the other end.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import DecodeError
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.peer.net.wire.addresses import parse_addrs
from petals.protocols.errors import RemoteProtocolError
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.types import PeerId

AUTONAT = "/libp2p/autonat/1.0.0"
MAX_MESSAGE_BYTES = 16 << 10
MAX_ADDRS = 8


async def ask(stream: ByteStream, me: PeerId, addrs: Sequence[str]) -> bool:
    """Whether the peer at the other end could dial one of `addrs`; `stream` is closed then.

    Raises:
        RemoteError: it broke, or speaks nonsense.
    """
    messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
    request = Message(type=Message.MessageType.DIAL)
    request.dial.peer.id = ID.from_base58(me).to_bytes()
    request.dial.peer.addrs.extend(Multiaddr(addr).to_bytes() for addr in addrs[:MAX_ADDRS])
    await messages.write_message(request.SerializeToString())
    data = await messages.read_message()
    await messages.close()
    reply = _parse(data, stream)
    if reply.type != Message.MessageType.DIAL_RESPONSE:
        raise RemoteProtocolError("no answer to the question whether we can be dialled", stream.remote_peer)
    return bool(reply.dialResponse.status == Message.ResponseStatus.OK)


async def read_question(messages: MessageStream) -> tuple[Multiaddr, ...]:
    """The addresses that the asker wants to be dialled at.

    Raises:
        RemoteProtocolError: that is no such question, or it is about another peer.
    """
    request = _parse(await messages.read_message(), messages.stream)
    if (
        request.type != Message.MessageType.DIAL
        or request.dial.peer.id != ID.from_base58(messages.remote_peer).to_bytes()
    ):
        raise RemoteProtocolError("wants somebody else to be dialled", messages.remote_peer)
    return parse_addrs(request.dial.peer.addrs[:MAX_ADDRS])


async def write_answer(messages: MessageStream, reached: Multiaddr | None) -> None:
    """Say which of them was reached; None: none."""
    status = Message.ResponseStatus.OK if reached is not None else Message.ResponseStatus.E_DIAL_ERROR
    reply = Message(type=Message.MessageType.DIAL_RESPONSE)
    reply.dialResponse.status = status
    if reached is not None:
        reply.dialResponse.addr = reached.to_bytes()
    await messages.write_message(reply.SerializeToString())


def _parse(data: bytes | None, stream: ByteStream) -> Message:
    if data is None:
        raise RemoteProtocolError("the stream ended instead of a message", stream.remote_peer)
    try:
        return Message.FromString(data)
    except DecodeError:
        raise RemoteProtocolError("an AutoNAT message that does not decode", stream.remote_peer) from None
