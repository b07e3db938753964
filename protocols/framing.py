"""Messages on a byte stream: an unsigned varint that counts, then that many bytes. Does no I/O."""

from __future__ import annotations

from petals.protocols.errors import ProtocolViolation

MAX_VARINT_BYTES = 9
"""63 bits, as the unsigned-varint specification of multiformats says."""


def encode_varint(value: int) -> bytes:
    """`value` >= 0, seven bits per byte, lowest first, the top bit set on all bytes but the last."""
    if value < 0:
        raise ValueError(f"an unsigned varint cannot hold {value}")
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def encode_frame(message: bytes) -> bytes:
    return encode_varint(len(message)) + message


class FrameDecoder:
    """Cuts a byte stream into messages, however the network sliced it.

    Args:
        max_frame_bytes: a longer message is refused as soon as its length is known, before it is here.
    """

    def __init__(self, max_frame_bytes: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()
        self._frame_bytes: int | None = None

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        self._buffer += data

    def next_frame(self) -> bytes | None:
        """The next whole message; None: need more data.

        Raises:
            ProtocolViolation: a length over the limit, or one that is no varint.
        """
        if self._frame_bytes is None:
            self._frame_bytes = self._take_length()
        size = self._frame_bytes
        if size is None or len(self._buffer) < size:
            return None
        frame = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        self._frame_bytes = None
        return frame

    def wanted(self) -> int:
        """How many more bytes belong to the current message for certain; at least 1 unless a whole one is here."""
        return max(self._frame_bytes - len(self._buffer), 0) if self._frame_bytes is not None else 1

    def is_empty(self) -> bool:
        """True between messages: what arrived is used up."""
        return self._frame_bytes is None and not self._buffer

    def take_rest(self, max_bytes: int) -> bytes:
        """At most `max_bytes` of what follows the last message: raw bytes the message announced."""
        rest = bytes(memoryview(self._buffer)[:max_bytes])
        del self._buffer[: len(rest)]
        return rest

    def put_back(self, data: bytes | bytearray | memoryview) -> None:
        """Undo `take_rest`: what was taken last comes first again."""
        self._buffer[:0] = data

    def _take_length(self) -> int | None:
        value = 0
        for index, byte in enumerate(self._buffer[:MAX_VARINT_BYTES]):
            value |= (byte & 0x7F) << 7 * index
            if value > self._max_frame_bytes:
                raise ProtocolViolation(f"message of at least {value} bytes, the limit is {self._max_frame_bytes}")
            if byte < 0x80:
                if byte == 0 and index:
                    raise ProtocolViolation("length is not the shortest varint")
                del self._buffer[: index + 1]
                return value
        if len(self._buffer) >= MAX_VARINT_BYTES:
            raise ProtocolViolation("length is no varint")
        return None
