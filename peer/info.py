"""/petals/info: a peer's own signed records, straight from it. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio
from google.protobuf.message import DecodeError

from petals import __version__
from petals.peer.host import Host
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import PeerUnreachable, RemoteProtocolError
from petals.protocols.info import INFO_V1, MAX_REPLY_BYTES, MAX_REQUEST_BYTES
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.types import ModelId, PeerId

INFO_S = 3.0
"""One question and its answer."""


async def answer_info(signed_records: Callable[[str], Sequence[bytes]], stream: ByteStream) -> None:
    """Tell who asks what we serve. `signed_records(digest)`: our records, all for an empty digest."""
    messages = MessageStream(stream, max_message_bytes=MAX_REQUEST_BYTES)
    with trio.move_on_after(INFO_S):  # a stranger that says nothing is left alone
        data = await messages.read_message()
        if data is None:
            return
        try:
            request = pb.InfoRequest.FromString(data)
        except DecodeError:
            raise RemoteProtocolError("an info request that does not decode", stream.remote_peer) from None
        reply = pb.InfoReply(records=signed_records(request.model_digest), version=__version__)
        await messages.write_message(reply.SerializeToString())


async def fetch_info(host: Host, peer_id: PeerId, addrs: Sequence[str], model: ModelId) -> pb.InfoReply:
    """What `peer_id` says of itself: its signed records of `model` (all, for an empty digest), its version.

    Raises:
        PeerUnreachable: no answer within `INFO_S`. RequestRefused: it does not speak the protocol.
        RemoteProtocolError: nonsense.
    """
    with trio.move_on_after(INFO_S):
        stream = await host.open_stream(peer_id, INFO_V1, addrs=addrs)
        messages = MessageStream(stream, max_message_bytes=MAX_REPLY_BYTES)
        try:
            await messages.write_message(pb.InfoRequest(model_digest=model.digest).SerializeToString())
            data = await messages.read_message()
            await messages.close()
        except BaseException:
            await messages.reset()
            raise
        try:
            return pb.InfoReply.FromString(data or b"")
        except DecodeError:
            raise RemoteProtocolError("an info reply that does not decode", peer_id) from None
    raise PeerUnreachable(f"peer …{peer_id[-6:]} did not answer within {INFO_S} s", peer_id)


async def fetch_record(host: Host, peer_id: PeerId, addrs: Sequence[str], model: ModelId) -> bytes | None:
    """The signed record of `model` at `peer_id`, None if it serves no such model. Raises as `fetch_info`."""
    records = (await fetch_info(host, peer_id, addrs, model)).records
    return records[0] if records else None
