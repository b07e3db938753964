"""/petals/info: a peer's own signed records, straight from it. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

import trio
from google.protobuf.message import DecodeError

from petals import __version__
from petals.peer.base.rate_limit import MISTAKE
from petals.peer.membership.complaints import MAX_TOLD, ComplaintBook
from petals.peer.net.host import Host
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import PeerUnreachable, RemoteProtocolError
from petals.protocols.info import INFO_V1, MAX_REPLY_BYTES, MAX_REQUEST_BYTES
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.types import ModelId, PeerId

MAX_HEARD = 1
"""Complaints with one question."""
COMPLAINT_COSTS = 4
"""Streams: reading one takes up to five signatures."""
INFO_S = 3.0
"""One question and its answer."""


async def answer_info(
    signed_records: Callable[[str], Sequence[bytes]],
    stream: ByteStream,
    *,
    complaints: ComplaintBook | None = None,
    charge: Callable[[PeerId, int], None] = lambda *_: None,
) -> None:
    """Tell who asks what we serve.

    Args:
        signed_records: digest -> our records, all for an empty digest.
        complaints: what others have told us is kept there, and passed on.
        charge: `Host.charge`. A complaint costs its sender streams, one that is not believed those of a mistake.
    """
    messages = MessageStream(stream, max_message_bytes=MAX_REQUEST_BYTES)
    with trio.move_on_after(INFO_S):  # a stranger that says nothing is left alone
        data = await messages.read_message()
        if data is None:
            return
        try:
            request = pb.InfoRequest.FromString(data)
        except DecodeError:
            raise RemoteProtocolError("an info request that does not decode", stream.remote_peer) from None
        records = signed_records(request.model_digest)
        reply = pb.InfoReply(records=records, version=__version__, unix_time=time.time())
        if complaints is not None:
            if heard := request.complaints[:MAX_HEARD]:
                charge(stream.remote_peer, COMPLAINT_COSTS)
                if await complaints.hear(heard):
                    charge(stream.remote_peer, MISTAKE)
            reply.complaints.extend(complaints.about(request.model_digest))
        await messages.write_message(reply.SerializeToString())


async def fetch_info(
    host: Host, peer_id: PeerId, addrs: Sequence[str], model: ModelId, *, tell: Sequence[bytes] = ()
) -> pb.InfoReply:
    """What `peer_id` says of itself: its signed records of `model` (all, for an empty digest), its version.

    Args:
        tell: complaints to be passed on.
    Raises:
        PeerUnreachable: no answer within `INFO_S`. RequestRefused: it does not speak the protocol.
        RemoteProtocolError: nonsense.
    """
    with trio.move_on_after(INFO_S):
        stream = await host.open_stream(peer_id, INFO_V1, addrs=addrs)
        messages = MessageStream(stream, max_message_bytes=MAX_REPLY_BYTES)
        try:
            request = pb.InfoRequest(model_digest=model.digest, complaints=tell)
            await messages.write_message(request.SerializeToString())
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


async def fetch_record(
    host: Host,
    peer_id: PeerId,
    addrs: Sequence[str],
    model: ModelId,
    *,
    tell: Sequence[bytes] = (),
    hear: Callable[[Sequence[bytes]], Awaitable[object]] | None = None,
) -> bytes | None:
    """The signed record of `model` at `peer_id`, None if it serves no such model. Raises as `fetch_info`.

    Args:
        tell: complaints to be passed on. hear: told of those that it passes on.
    """
    reply = await fetch_info(host, peer_id, addrs, model, tell=tell)
    if hear is not None and reply.complaints:
        await hear(reply.complaints[:MAX_TOLD])
    return reply.records[0] if reply.records else None
