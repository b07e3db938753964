"""Passing a checkpoint on to newcomers: from its files, a piece at a time, never faster than the operator allows."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import trio

from petals.models.errors import ModelError
from petals.models.source.checkpoint import Checkpoint
from petals.models.source.licence import may_share
from petals.models.source.weights import SharedWeights
from petals.peer.base.config import ServeConfig
from petals.peer.base.token_bucket import TokenBucket
from petals.peer.engine.stream_rules import Refused
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import PeerUnreachable, RemoteProtocolError
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.types import PeerId
from petals.protocols.weights import (
    MAX_DOCUMENT_BYTES,
    MAX_REQUEST_BYTES,
    document_part,
    parse_request,
)

log = logging.getLogger(__name__)

MAX_STREAMS = 64
MAX_STREAMS_PER_PEER = 8
IDLE_S = 60.0
"""How long a stream may ask nothing."""
MAX_WAIT_S = 5.0
"""Longer than this nobody waits in the rate limit's queue: BUSY, come again."""
BURST_BYTES = 2 << 20
"""Little, so that decode steps find gaps between pieces, whatever the rate."""
GOODBYE_S = 5.0


def refusal_of(checkpoint: Checkpoint, config: ServeConfig) -> str | None:
    """Why this checkpoint is not passed on, in one line; None: it is."""
    if config.share_weights is True or (config.share_weights is None and may_share(checkpoint.licence)):
        return None
    if config.share_weights is False:
        return f"the operator does not share the weights of {checkpoint.name}"
    licence = f"is {checkpoint.licence}" if checkpoint.licence else "is not stated"
    return (
        f"weights of {checkpoint.name} are not shared: its licence {licence}, which is not among those known to let "
        "anybody pass weights on; an operator who may gives --share_weights"
    )


class WeightSender:
    """Answers `/petals/weights` for one checkpoint; `answer` is the handler of its streams.

    Args:
        admits: whether a peer may use the server at all.
    """

    def __init__(self, checkpoint: Checkpoint, config: ServeConfig, admits: Callable[[PeerId], bool]) -> None:
        self._admits = admits
        self.refusal = refusal_of(checkpoint, config)
        self.sent_bytes = 0
        """Of pieces and documents, so far."""
        self._digest = checkpoint.digest
        self._shared = SharedWeights(checkpoint)
        self._payload_s = config.payload_s
        self._rate = config.max_share_bytes_s
        self._bucket = TokenBucket(config.max_share_bytes_s, BURST_BYTES)
        self._streams: Counter[PeerId] = Counter()
        self._documents: dict[int, tuple[bytes, bytes]] = {}
        """With their SHA-256."""
        self._hashing = trio.CapacityLimiter(1)
        self._reading = trio.CapacityLimiter(2)

    def describe(self) -> str:
        """One line for the operator."""
        if self.refusal is not None:
            return self.refusal
        licence = self._shared.checkpoint.licence or "licence unknown"
        return f"newcomers may fetch swarm:{self._digest} ({licence}), at most {self._rate / 1e6:,.0f} MB/s"

    async def answer(self, stream: ByteStream) -> None:
        """Answer requests on one stream until its asker ends it, or asks what can not be given."""
        messages = MessageStream(stream, max_message_bytes=MAX_REQUEST_BYTES)
        try:
            if not self._admits(stream.remote_peer):
                raise Refused(pb.FORBIDDEN, "these weights are for peers that its operator knows")
            with self._count(stream.remote_peer):
                while (data := await self._next(messages)) is not None:
                    await self._answer_one(messages, data)
                return
        except Refused as refusal:
            error = refusal.as_message()
        except ModelError as damaged:
            log.warning("weights can not be shared: %s", damaged)
            error = pb.Error(code=pb.INTERNAL, message=str(damaged)[:1000])
        except RemoteProtocolError as violation:
            log.info("…%s broke the rules: %s", stream.remote_peer[-6:], violation)
            error = pb.Error(code=pb.MALFORMED, message=str(violation)[:1000])
        with trio.move_on_after(GOODBYE_S):
            await messages.write_message(pb.WeightsReply(error=error).SerializeToString())

    async def _next(self, messages: MessageStream) -> bytes | None:
        with trio.move_on_after(IDLE_S):
            return await messages.read_message()
        raise Refused(pb.OUT_OF_ORDER, f"nothing came for {IDLE_S:.0f} s")

    async def _answer_one(self, messages: MessageStream, data: bytes) -> None:
        request, kind = parse_request(data)
        if request.model_digest != self._digest:
            raise Refused(pb.UNKNOWN_MODEL, f"this server holds {self._shared.checkpoint.name} ({self._digest[:12]})")
        if self.refusal is not None:
            raise Refused(pb.UNSUPPORTED, self.refusal)
        number = request.document.document if kind == "document" else request.piece.section
        if not self._shared.holds(number):
            raise Refused(pb.BLOCKS_NOT_HELD, f"document {number} is not here")
        document, sha256 = await self._document(number)  # the pieces of a section are known once it is hashed
        if kind == "document":
            reply, payload = document_part(document, sha256, request.document)
        else:
            payload = memoryview(await self._piece(number, request.piece.sha256))
            reply = pb.WeightsReply(part=pb.WeightsPart(nbytes=len(payload)))
        await self._wait(len(payload))
        with trio.move_on_after(self._payload_s) as scope:
            await messages.write_message(reply.SerializeToString(), payload)
        if scope.cancelled_caught:
            raise PeerUnreachable("the answer was not taken", messages.remote_peer)
        self.sent_bytes += len(payload)

    async def _document(self, number: int) -> tuple[bytes, bytes]:
        if number not in self._documents:
            read = partial(_with_hash, self._shared, number)
            self._documents[number] = await trio.to_thread.run_sync(read, limiter=self._hashing)
        document, sha256 = self._documents[number]
        if len(document) > MAX_DOCUMENT_BYTES:
            raise Refused(pb.UNSUPPORTED, f"document {number} of {len(document)} bytes is too large to travel")
        return document, sha256

    async def _piece(self, section: int, sha256: bytes) -> bytes:
        read = partial(self._shared.piece, section, sha256)
        piece = await trio.to_thread.run_sync(read, limiter=self._reading)
        if piece is None:
            raise RemoteProtocolError(f"document {section} lists no such piece")
        return piece

    async def _wait(self, nbytes: int) -> None:
        """Until the rate limit lets so many bytes go."""
        delay = self._bucket.delay(nbytes, trio.current_time())
        if delay > MAX_WAIT_S:
            raise Refused(pb.BUSY, "others are fetching, too", retry_after_s=delay - MAX_WAIT_S + 1)
        await trio.sleep(self._bucket.take(nbytes, trio.current_time()))

    @contextmanager
    def _count(self, peer_id: PeerId) -> Iterator[None]:
        if self._streams[peer_id] >= MAX_STREAMS_PER_PEER or self._streams.total() >= MAX_STREAMS:
            raise Refused(pb.QUOTA, f"one peer may fetch on {MAX_STREAMS_PER_PEER} streams", retry_after_s=5.0)
        self._streams[peer_id] += 1
        try:
            yield
        finally:
            self._streams[peer_id] -= 1
            self._streams += Counter()


def _with_hash(shared: SharedWeights, number: int) -> tuple[bytes, bytes]:
    document = shared.document(number)
    return document, hashlib.sha256(document).digest()
