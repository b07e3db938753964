"""The only file of this room that awaits: byte streams in, messages out."""

from __future__ import annotations

from typing import Protocol

import trio

from petals.protocols.errors import ProtocolViolation, RemoteProtocolError
from petals.protocols.framing import FrameDecoder, encode_frame
from petals.protocols.types import PeerId

_READ_BYTES = 64 * 1024
_COALESCE_BYTES = 16 * 1024
"""A message and payload together below this are one write; a larger payload is worth a write of its own."""

_PAYLOAD_STEP_BYTES = 1 << 20
"""A payload's buffer starts with this and at most doubles each time it is full."""


class ByteStream(Protocol):
    """One bidirectional stream to one peer. Any call may be cancelled; a cut write leaves the stream reset."""

    @property
    def remote_peer(self) -> PeerId:
        """Who is on the other end, as authenticated by the connection."""
        ...

    async def read(self, max_bytes: int) -> bytes | bytearray | memoryview:
        """At least one and at most `max_bytes` bytes; empty at the clean end.

        Raises:
            PeerUnreachable: the stream was reset or its connection died.
            RemoteProtocolError: the connection died because the peer broke its rules.
        """
        ...

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`; returns once it is queued within the stream's window.

        Raises:
            PeerUnreachable: the stream was reset or its connection died.
        """
        ...

    async def close_write(self) -> None:
        """Say that no more bytes follow; reading goes on."""
        ...

    async def close(self) -> None:
        """End both directions cleanly. Idempotent."""
        ...

    async def reset(self) -> None:
        """End both directions at once; what was in flight is lost. Idempotent, never raises."""
        ...


class MessageStream:
    """Messages with a length in front, and raw payloads behind them, on a ByteStream. One reader, one writer.

    Args:
        max_message_bytes: a longer message ends the conversation before any of it is stored. Payloads are bounded by
            whoever announces them.
    """

    def __init__(self, stream: ByteStream, *, max_message_bytes: int) -> None:
        self.stream = stream
        self._decoder = FrameDecoder(max_message_bytes)

    @property
    def remote_peer(self) -> PeerId:
        return self.stream.remote_peer

    @property
    def cipher_s(self) -> float:
        """Seconds of encrypting and decrypting so far, of all streams of the connection; 0 where nobody counts."""
        return float(getattr(self.stream, "cipher_s", 0.0))

    @property
    def is_lost(self) -> bool:
        """Whether the stream is known to be reset or its connection dead; False where nobody looks."""
        return bool(getattr(self.stream, "is_lost", False))

    async def read_message(self) -> bytes | None:
        """The next message; None at a clean end between messages. A cancelled call loses nothing.

        Raises:
            RemoteProtocolError: longer than `max_message_bytes`, or the stream ends inside a message.
            PeerUnreachable: the stream was reset or its connection died.
        """
        while True:
            try:
                message = self._decoder.next_frame()
            except ProtocolViolation as error:
                raise RemoteProtocolError(str(error), self.remote_peer) from None
            if message is not None:
                return message
            data = await self.stream.read(_READ_BYTES)
            if not data:
                if self._decoder.is_empty():
                    return None
                raise RemoteProtocolError("the stream ended inside a message", self.remote_peer)
            self._decoder.receive_data(data)

    async def write_message(self, message: bytes, *payload: bytes | bytearray | memoryview) -> None:
        """Send one message and the raw payload it announces. Pieces of the payload are not copied here, unless they
        are small enough to travel with the message."""
        head = bytearray(encode_frame(message))
        for index, piece in enumerate(payload):
            view = memoryview(piece).cast("B")
            if len(head) + len(view) <= _COALESCE_BYTES:
                head += view
                continue
            if head:
                await self.stream.write(head)
                head = bytearray()
            if index == len(payload) - 1 or len(view) > _COALESCE_BYTES:
                await self.stream.write(view)
            else:
                head += view
        if head:
            await self.stream.write(head)

    async def read_some(self, max_bytes: int) -> bytes:
        """At least one raw byte and at most `max_bytes`; empty at the clean end."""
        return self._decoder.take_rest(max_bytes) or bytes(await self.stream.read(max_bytes))

    async def read_exactly(self, n: int) -> bytes:
        """`n` raw bytes. A cancelled call loses nothing.

        Raises:
            RemoteProtocolError: the stream ends before.
        """
        data = bytearray(n)
        await self.read_into(memoryview(data))
        return bytes(data)

    async def read_into(self, buffer: memoryview) -> None:
        """Fill `buffer` with raw bytes. A cancelled call loses nothing: the next one starts with the same bytes.

        Raises:
            RemoteProtocolError: the stream ends before.
        """
        view, have = buffer.cast("B"), 0
        try:
            while have < len(view):
                left = len(view) - have
                piece = self._decoder.take_rest(left) or await self.stream.read(left)
                if not piece:
                    raise RemoteProtocolError(f"the stream ended {left} bytes too early", self.remote_peer)
                view[have : have + len(piece)] = piece
                have += len(piece)
        except trio.Cancelled:
            self._decoder.put_back(view[:have])
            raise

    async def read_payload(self, n: int) -> bytearray:
        """`n` raw bytes in a buffer of their own, which grows as they come: announcing much costs a peer much.

        Raises:
            RemoteProtocolError: the stream ends before.
        """
        if n <= _PAYLOAD_STEP_BYTES:
            payload = bytearray(n)
            await self.read_into(memoryview(payload))
            return payload
        payload = bytearray()
        try:
            while (have := len(payload)) < n:
                payload += bytes(min(n - have, max(_PAYLOAD_STEP_BYTES, have)))
                with memoryview(payload) as view:
                    await self.read_into(view[have:])
        except trio.Cancelled:
            self._decoder.put_back(memoryview(payload)[:have])
            raise
        return payload

    async def close_write(self) -> None:
        await self.stream.close_write()

    async def close(self) -> None:
        await self.stream.close()

    async def reset(self) -> None:
        await self.stream.reset()
