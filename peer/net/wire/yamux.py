"""The yamux session machine: frames, windows and limits of many streams over one connection. Does no I/O.

The wire (hashicorp/yamux spec.md; libp2p specs, yamux/README.md) is a 12-byte header and, for DATA, a body:

    version 0 (1) | type (1) | flags (2) | stream id (4) | length (4)          all big-endian

    DATA 0            length = bytes of body that follow
    WINDOW_UPDATE 1   length = bytes the sender of this frame is ready to take on top of what it said before
    PING 2            length = a number to send back; flag SYN asks, flag ACK answers; stream id 0
    GO_AWAY 3         length = 0 normal, 1 protocol error, 2 internal error; stream id 0

SYN opens a stream, ACK accepts it, FIN closes one direction, RST ends both; they ride on DATA or WINDOW_UPDATE. The
dialler's streams are odd, the listener's even. Both directions of a stream start with a window of 256 KiB, a constant
of the protocol; a sender that exceeds it breaks the connection.

Two rules keep memory bounded while one stream can still be fast:

* A window doubles, up to `max_window`, only when its reader has taken half of it, and only while the windows of all
  streams together fit into `buffer_bytes`. Whoever pauses therefore holds at most what it was granted before.
* The 256 KiB that every stream starts with cannot be refused, so what really lies unread is counted too: a body that
  would push the sum over `buffer_bytes` costs its stream (RST), and nobody else.

The application's half (`read`, `write`, `close_write` ...) and the wire's half (`receive_data`, `take_output`) are
plain calls: each is done when it returns, so no cancellation can cut one in two.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag, auto
from typing import Any, NamedTuple

from petals.protocols.errors import LocalProtocolError, ProtocolViolation

PROTOCOL = "/yamux/1.0.0"
INITIAL_WINDOW = 256 * 1024
MAX_UINT32 = 2**32 - 1

HEADER = struct.Struct(">BBHII")
HEADER_BYTES = HEADER.size

_COPY_BELOW = 4096
"""A body piece shorter than this is copied together with its neighbours: a view would keep its whole Noise message
alive, and a peer that sends single bytes would cost 65,519 bytes for each."""
_ACCUMULATE = 65536
_MAX_CONTROL_BYTES = 1 << 20
"""Replies waiting for a peer that asks and does not read (pings, refusals)."""


class FrameType(IntEnum):
    DATA = 0
    WINDOW_UPDATE = 1
    PING = 2
    GO_AWAY = 3


class Flag(IntFlag):
    SYN = 1
    ACK = 2
    FIN = 4
    RST = 8


class GoAway(IntEnum):
    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


# IntEnum and IntFlag cost a microsecond per comparison; the hot path compares plain numbers.
_DATA, _WINDOW_UPDATE, _PING, _GO_AWAY = (int(kind) for kind in FrameType)
_SYN, _ACK, _FIN, _RST = (int(flag) for flag in Flag)
_ALL_FLAGS = _SYN | _ACK | _FIN | _RST


@dataclass(frozen=True, slots=True, kw_only=True)
class YamuxLimits:
    """What one connection may cost. All sizes in bytes."""

    max_streams: int = 4096
    """Streams of each side that are open at once; one more is refused with RST."""
    max_window: int = 4 << 20
    """What one stream's peer may send ahead of its reader, at most."""
    buffer_bytes: int = 64 << 20
    """Granted windows beyond the first 256 KiB fit into this; so do all unread bytes."""
    max_frame_bytes: int = 65519 - HEADER_BYTES
    """Longest body we send: with its header it fills one Noise message exactly."""
    linger_s: float = 60.0
    """A stream we have closed waits this long for the other end's FIN, then it is reset."""

    def __post_init__(self) -> None:
        if self.max_window < INITIAL_WINDOW:
            raise ValueError(f"max_window is {self.max_window}, yamux starts at {INITIAL_WINDOW}")
        if min(self.max_streams, self.max_frame_bytes, self.buffer_bytes) < 1:
            raise ValueError("limits must be positive")


class EventKind(Enum):
    OPENED = auto()
    """The peer opened `stream`."""
    READABLE = auto()
    """Bytes, or the end of them, arrived on `stream`."""
    WRITABLE = auto()
    """The window of `stream` grew."""
    RESET = auto()
    """`stream` is over, both ways."""
    PONG = auto()
    """Our ping `value` came back."""
    GO_AWAY = auto()
    """The peer takes no more streams; `value` is its reason."""


class Event(NamedTuple):
    kind: EventKind
    stream: YamuxStream | None = None
    value: int = 0


class YamuxStream:
    """One stream as the machine knows it. Read the fields; change them through the session only."""

    __slots__ = (
        "discarded",
        "id",
        "inbox",
        "inbox_bytes",
        "local_closed",
        "owner",
        "read_closed",
        "receive_window",
        "remote_closed",
        "reset",
        "reset_reason",
        "send_window",
        "target_window",
    )

    def __init__(self, stream_id: int) -> None:
        self.id = stream_id
        self.inbox: deque[bytes | bytearray | memoryview] = deque()
        self.inbox_bytes = 0
        self.send_window = INITIAL_WINDOW
        self.receive_window = INITIAL_WINDOW
        """What the peer may still send."""
        self.target_window = INITIAL_WINDOW
        """`receive_window` and unread bytes together never exceed this."""
        self.local_closed = False
        self.remote_closed = False
        self.read_closed = False
        self.reset = False
        self.reset_reason = ""
        self.discarded = 0
        self.owner: Any = None
        """Whatever the shell hangs here."""


class YamuxSession:
    """Both ends of the protocol in one machine.

    Args:
        is_client: we dialled; decides who opens odd streams.
    """

    def __init__(self, *, is_client: bool, limits: YamuxLimits | None = None) -> None:
        self.limits = limits or YamuxLimits()
        self.streams: dict[int, YamuxStream] = {}
        self.buffered = 0
        """Unread bytes of all streams."""
        self.granted = 0
        """Sum of the target windows of all streams."""
        self.remote_gone: int | None = None
        """The reason of the peer's GO_AWAY, None before it came."""
        self.local_gone = False
        self.output_bytes = 0
        """What waits for `take_output`."""
        self._output: list[bytes] = []
        self._control_bytes = 0
        self._next_id = 1 if is_client else 2
        self._remote_parity = 0 if is_client else 1
        self._last_remote_id = 0
        self._n_remote = 0
        self._closing: dict[int, float] = {}
        # Where the incoming wire stands: inside a header, or inside the body of a DATA frame.
        self._header = bytearray()
        self._body_left = 0
        self._body_stream: YamuxStream | None = None
        self._body_flags = 0

    # -- the application's half ------------------------------------------------------------------------------------

    def open_stream(self) -> YamuxStream:
        """A new stream; its SYN is in the output.

        Raises:
            LocalProtocolError: one of the ends has said GO_AWAY, or `max_streams` of ours are open.
        """
        if self.local_gone or self.remote_gone is not None:
            raise LocalProtocolError("no new streams after GO_AWAY")
        if len(self.streams) - self._n_remote >= self.limits.max_streams or self._next_id > MAX_UINT32 - 2:
            raise LocalProtocolError(f"{self.limits.max_streams} streams of ours are open already")
        stream = YamuxStream(self._next_id)
        self._next_id += 2
        self.streams[stream.id] = stream
        self.granted += stream.target_window
        # SYN rides alone, not on the first data: stock py-libp2p and go are happiest with it.
        self._frame(_WINDOW_UPDATE, _SYN, stream.id, 0)
        return stream

    def write(self, stream: YamuxStream, data: memoryview) -> int:
        """Queue as much of `data` as the window and one frame allow. Returns that number of bytes; 0: no window.

        Raises:
            LocalProtocolError: this end said FIN already, or the stream was reset.
        """
        if stream.local_closed or stream.reset:
            raise LocalProtocolError("write on a closed stream")
        taken = min(len(data), stream.send_window, self.limits.max_frame_bytes)
        if taken:
            stream.send_window -= taken
            self._put(b"".join((HEADER.pack(0, _DATA, 0, stream.id, taken), data[:taken])))
        return taken

    def read(self, stream: YamuxStream, max_bytes: int) -> bytes | bytearray | memoryview:
        """At most `max_bytes` of what has arrived; empty: nothing is here, the stream says whether more can come."""
        inbox = stream.inbox
        if not inbox:
            return b""
        piece = inbox[0]
        if len(piece) <= max_bytes:
            inbox.popleft()
        else:
            view = memoryview(piece)
            piece, inbox[0] = view[:max_bytes], view[max_bytes:]
        stream.inbox_bytes -= len(piece)
        self.buffered -= len(piece)
        if not stream.remote_closed and not stream.reset:
            self._grant(stream)
        return piece

    def close_write(self, stream: YamuxStream) -> None:
        """Say FIN. Idempotent."""
        if not stream.local_closed and not stream.reset:
            stream.local_closed = True
            self._frame(_WINDOW_UPDATE, _FIN, stream.id, 0)
            self._forget_if_over(stream)

    def close_read(self, stream: YamuxStream, now: float) -> None:
        """Nobody will read `stream` any more: what comes is dropped, and a peer that keeps sending is told by RST.

        Args:
            now: seconds on the clock that `expire` is called with.
        """
        if stream.read_closed:
            return
        stream.read_closed = True
        self._drop_inbox(stream)
        if stream.id in self.streams:
            self._closing[stream.id] = now + self.limits.linger_s

    def reset(self, stream: YamuxStream) -> None:
        """End both directions; tell the peer unless it knows. Idempotent."""
        if stream.id in self.streams and not stream.reset:
            self._frame(_WINDOW_UPDATE, _RST, stream.id, 0)
        self._end(stream, "reset by this end")

    def expire(self, now: float) -> None:
        """Reset the streams we closed more than `linger_s` ago whose other end never said FIN."""
        for stream_id in [stream_id for stream_id, due in self._closing.items() if due <= now]:
            self.reset(self.streams[stream_id])

    def ping(self, value: int) -> None:
        self._frame(_PING, _SYN, 0, value)

    def go_away(self, reason: GoAway = GoAway.NORMAL) -> None:
        """Take no more streams. The open ones go on."""
        if not self.local_gone:
            self.local_gone = True
            self._frame(_GO_AWAY, 0, 0, reason)

    # -- the wire's half -------------------------------------------------------------------------------------------

    def take_output(self) -> list[bytes]:
        """Every frame to send, once."""
        output, self._output, self._control_bytes, self.output_bytes = self._output, [], 0, 0
        return output

    def receive_data(self, data: bytes) -> list[Event]:
        """Digest what arrived, however the network sliced it.

        Raises:
            ProtocolViolation: the peer broke a rule. The session is over; GO_AWAY with the reason is in the output.
        """
        events: list[Event] = []
        try:
            self._digest(data, events)
        except ProtocolViolation:
            self.go_away(GoAway.PROTOCOL_ERROR)
            raise
        return events

    def _digest(self, data: bytes, events: list[Event]) -> None:
        view, position, size = memoryview(data), 0, len(data)
        while position < size:
            if self._body_left:
                end = min(position + self._body_left, size)
                self._body_left -= end - position
                self._deliver(view[position:end], size, events)
                position = end
                if not self._body_left:
                    self._finish_body(events)
            elif not self._header and size - position >= HEADER_BYTES:
                header = HEADER.unpack_from(data, position)
                position += HEADER_BYTES
                if not self._is_plain_data(header):
                    self._on_header(header, events)
            else:
                end = min(position + HEADER_BYTES - len(self._header), size)
                self._header += view[position:end]
                position = end
                if len(self._header) == HEADER_BYTES:
                    header = HEADER.unpack(self._header)
                    self._header.clear()
                    self._on_header(header, events)

    def _is_plain_data(self, header: tuple[int, ...]) -> bool:
        """Take the header of a DATA frame without flags that breaks no rule, as nearly all are: the short way."""
        version, kind, flags, stream_id, length = header
        if version or kind or flags or not length:
            return False
        stream = self.streams.get(stream_id)
        if stream is None or stream.remote_closed or length > stream.receive_window:
            return False
        stream.receive_window -= length
        self._body_stream, self._body_flags, self._body_left = stream, 0, length
        return True

    def _on_header(self, header: tuple[int, ...], events: list[Event]) -> None:
        version, kind, flags, stream_id, length = header
        if version != 0:
            raise ProtocolViolation(f"yamux version {version}")
        if flags & ~_ALL_FLAGS:
            raise ProtocolViolation(f"yamux flags {flags:#06x}")
        if kind in (_DATA, _WINDOW_UPDATE):
            self._on_stream_frame(kind, flags, stream_id, length, events)
        elif stream_id != 0:
            raise ProtocolViolation(f"yamux frame type {kind} on stream {stream_id}")
        elif kind == _PING:
            self._on_ping(flags, length, events)
        elif kind == _GO_AWAY:
            self.remote_gone = length
            events.append(Event(EventKind.GO_AWAY, None, length))
        else:
            raise ProtocolViolation(f"yamux frame type {kind}")

    def _on_ping(self, flags: int, value: int, events: list[Event]) -> None:
        if flags == _SYN:
            self._control(_PING, _ACK, 0, value)
        elif flags == _ACK:
            events.append(Event(EventKind.PONG, None, value))
        else:
            raise ProtocolViolation(f"yamux ping with flags {flags:#06x}")

    def _on_stream_frame(self, kind: int, flags: int, stream_id: int, length: int, events: list[Event]) -> None:
        if stream_id == 0:
            raise ProtocolViolation("yamux stream frame on stream 0")
        if flags & _SYN:
            stream = self._accept(stream_id, events)
        else:
            stream = self.streams.get(stream_id)
            if stream is None and not self._was_open(stream_id):
                raise ProtocolViolation(f"yamux frame on stream {stream_id}, which was never opened")
        if kind == _DATA:
            self._on_data(stream, flags, length, events)
        elif stream is not None:
            if length:
                stream.send_window += length
                if stream.send_window > MAX_UINT32:
                    raise ProtocolViolation(f"yamux window of stream {stream_id} overflows")
                events.append(Event(EventKind.WRITABLE, stream))
            self._on_end_flags(stream, flags, events)

    def _on_data(self, stream: YamuxStream | None, flags: int, length: int, events: list[Event]) -> None:
        if stream is None:  # refused, or over on our side while this was under way
            if length > self.limits.max_window:
                raise ProtocolViolation(f"yamux body of {length} bytes, no window is that large")
        elif length and stream.remote_closed:
            raise ProtocolViolation(f"yamux data after FIN on stream {stream.id}")
        elif length > stream.receive_window:
            raise ProtocolViolation(
                f"yamux body of {length} bytes on stream {stream.id}, its window is {stream.receive_window}"
            )
        else:
            stream.receive_window -= length
        self._body_stream, self._body_flags, self._body_left = stream, flags, length
        if not length:
            self._finish_body(events)

    def _finish_body(self, events: list[Event]) -> None:
        stream, self._body_stream = self._body_stream, None
        if stream is not None:
            self._on_end_flags(stream, self._body_flags, events)

    def _on_end_flags(self, stream: YamuxStream, flags: int, events: list[Event]) -> None:
        if flags & _RST:
            self._end(stream, "reset by the peer")
            events.append(Event(EventKind.RESET, stream))
        elif flags & _FIN:
            stream.remote_closed = True
            self._forget_if_over(stream)
            events.append(Event(EventKind.READABLE, stream))

    def _accept(self, stream_id: int, events: list[Event]) -> YamuxStream | None:
        if stream_id % 2 != self._remote_parity:
            raise ProtocolViolation(f"yamux stream {stream_id} opened by the wrong end")
        if stream_id in self.streams:
            raise ProtocolViolation(f"yamux stream {stream_id} opened twice")
        self._last_remote_id = max(self._last_remote_id, stream_id)
        if self.local_gone or self._n_remote >= self.limits.max_streams:
            self._control(_WINDOW_UPDATE, _RST, stream_id, 0)
            return None
        stream = YamuxStream(stream_id)
        self.streams[stream_id] = stream
        self._n_remote += 1
        self.granted += stream.target_window
        # At once, not with the first answer: go stops opening after 256 streams that nobody has acknowledged.
        self._control(_WINDOW_UPDATE, _ACK, stream_id, 0)
        events.append(Event(EventKind.OPENED, stream))
        return stream

    def _was_open(self, stream_id: int) -> bool:
        """Whether `stream_id` can be one that is over: its last frames may still be under way."""
        if stream_id % 2 == self._remote_parity:
            return stream_id <= self._last_remote_id
        return stream_id < self._next_id

    def _deliver(self, piece: memoryview, message_bytes: int, events: list[Event]) -> None:
        stream = self._body_stream
        if stream is None:
            return
        size = len(piece)
        if stream.read_closed:
            stream.discarded += size
            if stream.discarded > stream.target_window // 2:
                self.reset(stream)
            return
        if self.buffered + size > self.limits.buffer_bytes:
            self.reset(stream)
            stream.reset_reason = f"reset: {self.limits.buffer_bytes} bytes lie unread on this connection"
            events.append(Event(EventKind.RESET, stream))
            return
        inbox = stream.inbox
        if size >= _COPY_BELOW and size * 2 >= message_bytes:
            inbox.append(piece)
        elif inbox and isinstance(last := inbox[-1], bytearray) and len(last) < _ACCUMULATE:
            last += piece
        else:
            inbox.append(bytearray(piece))
        stream.inbox_bytes += size
        self.buffered += size
        events.append(Event(EventKind.READABLE, stream))

    # -- bookkeeping -----------------------------------------------------------------------------------------------

    def _grant(self, stream: YamuxStream) -> None:
        """Tell the peer what its reader has made room for, once that is worth a frame."""
        room = stream.target_window - stream.receive_window - stream.inbox_bytes
        if room < stream.target_window // 2:
            return
        growth = min(stream.target_window, self.limits.max_window - stream.target_window)
        if growth and self.granted + growth <= self.limits.buffer_bytes:
            stream.target_window += growth
            self.granted += growth
            room += growth
        stream.receive_window += room
        self._frame(_WINDOW_UPDATE, 0, stream.id, room)

    def _frame(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        self._put(HEADER.pack(0, kind, flags, stream_id, length))

    def _put(self, frame: bytes) -> None:
        self._output.append(frame)
        self.output_bytes += len(frame)

    def _control(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """A frame that the peer provoked: as many may wait as an honest peer can want."""
        self._control_bytes += HEADER_BYTES
        if self._control_bytes > _MAX_CONTROL_BYTES:
            raise ProtocolViolation("yamux peer asks and does not read the answers")
        self._frame(kind, flags, stream_id, length)

    def _end(self, stream: YamuxStream, reason: str) -> None:
        if not stream.reset:
            stream.reset, stream.reset_reason = True, reason
            self._drop_inbox(stream)
            self._forget(stream)
            if self._body_stream is stream:  # the rest of the body under way is for nobody
                self._body_stream = None

    def _forget_if_over(self, stream: YamuxStream) -> None:
        if stream.local_closed and stream.remote_closed:
            self._forget(stream)

    def _forget(self, stream: YamuxStream) -> None:
        if self.streams.pop(stream.id, None) is not None:
            self.granted -= stream.target_window
            self._n_remote -= stream.id % 2 == self._remote_parity
            self._closing.pop(stream.id, None)

    def _drop_inbox(self, stream: YamuxStream) -> None:
        self.buffered -= stream.inbox_bytes
        stream.inbox_bytes = 0
        stream.inbox.clear()
