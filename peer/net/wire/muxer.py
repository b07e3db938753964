"""The only shell around the state machines: who waits, who is woken, who owns what.

One reader task per connection turns one socket read into many frames and wakes the streams they belong to. Sending is
a plain call that cannot be interrupted: it encrypts what is queued and hands it to the kernel. Only when the kernel
takes no more does the connection's one writer task get the rest; from then until that is gone it alone owns nonce and
socket, and whoever writes meanwhile just queues. So an idle connection sends without waking anybody, a busy one
coalesces, and neither needs a lock: between two awaits there is only one task.

Back-pressure, from the reader at the far end to the writer here: unread bytes -> no window update -> `write` waits for
its own window, other streams go on. A slow link -> the queue is full -> writers wait in line.

Cancellation: the machines' calls are atomic, so a cut `read` has taken nothing, and a cut `write` has queued whole
frames and resets its own stream, since half a message must not look like a whole one.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from petals.peer.base.concurrency import shielded_for
from petals.peer.net.wire.byte_pipe import Pipe
from petals.peer.net.wire.multistream import Dialler, Listener, proposal
from petals.peer.net.wire.noise import MAX_FRAME_BYTES, NoiseFraming
from petals.peer.net.wire.yamux import Event, EventKind, GoAway, YamuxLimits, YamuxSession, YamuxStream
from petals.protocols.errors import (
    LocalProtocolError,
    PeerUnreachable,
    ProtocolViolation,
    RemoteError,
    RemoteProtocolError,
    RequestRefused,
)
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

_SMALL_READ, _LARGE_READ = MAX_FRAME_BYTES + 1, 256 * 1024
"""A connection's receive buffer: one Noise frame fits always; it grows once for a peer that fills it."""

_YIELD_BYTES = 512 * 1024
_LONGEST_PAUSE_S = 5.0
"""In reading from a peer that opens streams too fast."""


def at_once(peer_id: PeerId) -> float:
    """The pace of peers that nobody slows down."""
    return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxerConfig:
    """How one connection behaves. Seconds and bytes, all positive."""

    keep_alive_s: float = 10.0
    """A peer from which nothing came for this long, a ping notwithstanding, is dead."""
    close_s: float = 1.0
    """What a goodbye may take."""
    negotiate_s: float = 10.0
    """From a stream's first byte to agreement on its protocol."""
    queue_bytes: int = 256 * 1024
    """What may wait for the socket before writers wait in line."""
    limits: YamuxLimits = field(default_factory=YamuxLimits)

    def __post_init__(self) -> None:
        if min(self.keep_alive_s, self.close_s, self.negotiate_s, self.queue_bytes) <= 0:
            raise ValueError("all times and sizes must be positive")


class _Parked:
    """One task waiting for one thing. A trio.Event would do; this costs a third, and it is what a round trip does."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    async def wait(self) -> None:
        self._task = trio.lowlevel.current_task()

        def abort(_: Callable[[], None]) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def wake(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)


class MuxedStream:
    """One stream of one connection: a ByteStream (protocols/stream.py) that one task reads and one task writes."""

    __slots__ = (
        "_connection",
        "_expected_reply",
        "_readable",
        "_reading",
        "_state",
        "_unyielded",
        "_writable",
        "_writing",
    )

    def __init__(self, connection: Connection, state: YamuxStream) -> None:
        self._connection = connection
        self._state = state
        self._readable, self._writable = _Parked(), _Parked()
        self._reading = self._writing = False
        self._unyielded = 0
        self._expected_reply: Dialler | None = None
        state.owner = self

    @property
    def remote_peer(self) -> PeerId:
        return self._connection.remote_peer

    @property
    def connection(self) -> Connection:
        return self._connection

    @property
    def cipher_s(self) -> float:
        """Seconds that this connection's ciphers took so far, at this end, all streams together."""
        return self._connection.cipher_s

    @property
    def is_lost(self) -> bool:
        """Whether the stream was reset or its connection died: nobody will read what is written."""
        return self._state.reset or self._connection.error is not None

    async def read(self, max_bytes: int) -> bytes | bytearray | memoryview:
        """At least one and at most `max_bytes` bytes; empty at the clean end.

        Raises:
            PeerUnreachable: the stream was reset or its connection died.
            RemoteProtocolError: the connection died because the peer broke its rules.
            RequestRefused: the peer does not speak the protocol this stream was opened for.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}")
        if self._reading:
            raise trio.BusyResourceError("another task reads this stream")
        self._reading = True
        try:
            if self._expected_reply is not None:
                await self._read_reply(self._expected_reply)
            return await self._read_some(max_bytes)
        finally:
            self._reading = False

    async def _read_some(self, max_bytes: int) -> bytes | bytearray | memoryview:
        state = self._state
        if state.inbox:
            # Others get their turn, but not after every piece of a large payload: a turn costs as much as the piece.
            self._unyielded += state.inbox_bytes if state.inbox_bytes < max_bytes else max_bytes
            if self._unyielded > _YIELD_BYTES:
                self._unyielded = 0
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.checkpoint_if_cancelled()
        while not state.inbox:
            if state.read_closed:
                raise trio.ClosedResourceError("this stream is closed")
            if state.remote_closed and not state.reset:
                await trio.lowlevel.checkpoint()
                return b""
            self._check_alive()
            await self._readable.wait()
        session = self._connection.session
        data = session.read(state, max_bytes)
        if session.output_bytes:
            self._connection.flush()
        return data

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`; returns once it is queued within the stream's window.

        Raises:
            PeerUnreachable, RemoteProtocolError: as `read`.
            trio.Cancelled: the stream is reset then.
        """
        if self._writing:
            raise trio.BusyResourceError("another task writes this stream")
        self._writing = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            await self._write_all(memoryview(data).cast("B"))
        except trio.Cancelled:
            self._reset_now()
            raise
        finally:
            self._writing = False

    async def _write_all(self, view: memoryview) -> None:
        connection, state = self._connection, self._state
        while view:
            self._check_alive()
            if state.local_closed:
                raise trio.ClosedResourceError("this stream is closed for writing")
            if connection.queue_is_full:
                connection.flush()
                await connection.wait_for_room()
                continue
            taken = connection.session.write(state, view)
            view = view[taken:]
            if not taken:
                connection.flush()
                await self._writable.wait()
        self._check_alive()
        connection.flush()

    async def close_write(self) -> None:
        """Say that no more bytes follow; reading goes on. Idempotent."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._connection.session.close_write(self._state)
        self._connection.flush()

    async def close(self) -> None:
        """End both directions cleanly: what was written arrives, what comes is dropped. Idempotent."""
        self._close_now()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def reset(self) -> None:
        """End both directions at once; what was in flight is lost. Idempotent, never raises; after `close` it does
        nothing, so that the last words are not taken back."""
        self._reset_now()

    def close_nowait(self) -> None:
        """`close`, for those who cannot wait."""
        self._close_now()

    def reset_nowait(self) -> None:
        """`reset`, for those who cannot wait."""
        self._reset_now()

    # -- negotiation -----------------------------------------------------------------------------------------------

    async def propose(self, protocol: str) -> None:
        """Say what this stream is for; the answer is checked by the first `read`, or by `confirm`."""
        self._expected_reply = Dialler(protocol)
        await self.write(proposal(protocol))

    async def confirm(self) -> None:
        """Wait until the peer has agreed to the protocol proposed. Raises as `read` does."""
        if self._expected_reply is not None:
            await self._read_reply(self._expected_reply)

    async def _read_reply(self, dialler: Dialler) -> None:
        try:
            while (agreed := dialler.agreed()) is None:
                data = await self._read_some(dialler.wanted())
                if not data:
                    raise PeerUnreachable("the peer closed the stream instead of agreeing on it", self.remote_peer)
                dialler.receive_data(data)
        except ProtocolViolation as error:
            self._reset_now()
            raise RemoteProtocolError(str(error), self.remote_peer) from None
        if not agreed:
            self._reset_now()
            raise RequestRefused(f"peer does not speak {dialler.protocol}", self.remote_peer)
        self._expected_reply = None
        self._connection.confirmed.add(dialler.protocol)

    async def answer(self, listener: Listener) -> str:
        """The listener's side: agree with the peer on one of `listener`'s protocols.

        Raises:
            PeerUnreachable: the peer gave up.
            ProtocolViolation: it speaks nonsense.
        """
        while True:
            chosen = listener.chosen()
            if output := listener.take_output():
                await self.write(output)
            if chosen is not None:
                return chosen
            data = await self._read_some(listener.wanted())
            if not data:
                raise PeerUnreachable("the peer closed the stream without naming a protocol", self.remote_peer)
            listener.receive_data(data)

    # -- called by the connection ----------------------------------------------------------------------------------

    def wake(self) -> None:
        self._readable.wake()
        self._writable.wake()

    def wake_reader(self) -> None:
        self._readable.wake()

    def wake_writer(self) -> None:
        self._writable.wake()

    def _check_alive(self) -> None:
        if self._connection.error is not None:
            raise self._connection.make_error()
        if self._state.reset:
            raise PeerUnreachable(f"stream {self._state.reset_reason}", self.remote_peer)

    def _close_now(self) -> None:
        session, state = self._connection.session, self._state
        session.close_write(state)
        session.close_read(state, trio.current_time())
        self.wake()
        self._connection.flush()

    def _reset_now(self) -> None:
        if self._state.local_closed and self._state.read_closed:
            return
        self._connection.session.reset(self._state)
        self.wake()
        self._connection.flush()


class Connection:
    """One authenticated connection: runs until it breaks or is closed; then every stream of it fails at once.

    Args:
        on_stream: called for each stream the peer opens, from the reader task; must not block or raise.
        pace: told of each stream whose peer opened it; returns the seconds for which nothing more is read from that.
        early: plaintext that arrived with the end of the handshake.
    """

    def __init__(
        self,
        pipe: Pipe,
        framing: NoiseFraming,
        *,
        remote_peer: PeerId,
        is_client: bool,
        on_stream: Callable[[MuxedStream], None],
        pace: Callable[[PeerId], float] = at_once,
        config: MuxerConfig | None = None,
        early: tuple[list[bytes], bytes] = ([], b""),
    ) -> None:
        self.remote_peer = remote_peer
        self.session = YamuxSession(is_client=is_client, limits=(config or MuxerConfig()).limits)
        self.error: RemoteError | None = None
        self.on_frozen: Callable[[], None] = lambda: None
        """Called when the keep-alive gives the peer up, before any stream is told."""
        self.rtt_s: float | None = None
        """Of the last ping."""
        self.confirmed: set[str] = set()
        """Protocols the peer has agreed to on this connection: proposing one of them again need not wait."""
        self.closed = trio.Event()
        self._config = config or MuxerConfig()
        self._queue_bytes = self._config.queue_bytes
        self._unyielded = 0
        self._pipe, self._framing, self._early = pipe, framing, early
        self._on_stream, self._pace = on_stream, pace
        self._unsent: memoryview | None = None
        self._writer = _Parked()
        self._in_line: deque[_Parked] = deque()
        self._scope = trio.CancelScope()
        self._started = False
        self._last_received = 0.0
        self._ping: tuple[int, float] | None = None

    @property
    def cipher_s(self) -> float:
        """Seconds that both ciphers took so far, at this end."""
        return self._framing.cipher_s

    @property
    def takes_streams(self) -> bool:
        return self.error is None and self.session.remote_gone is None and not self.session.local_gone

    @property
    def is_idle(self) -> bool:
        """Alive, and without any stream."""
        return self.takes_streams and not self.session.streams

    # -- streams ---------------------------------------------------------------------------------------------------

    def open_stream(self) -> MuxedStream:
        """A new stream. Its SYN goes out with the first bytes written.

        Raises:
            PeerUnreachable: the connection is dead or going away, or too many streams are open.
        """
        if self.error is not None:
            raise self.make_error()
        try:
            return MuxedStream(self, self.session.open_stream())
        except LocalProtocolError as error:
            raise PeerUnreachable(str(error), self.remote_peer) from None

    def make_error(self) -> RemoteError:
        """Why this connection is dead; a new object each time, since tracebacks grow on the one that is raised."""
        assert self.error is not None
        return type(self.error)(str(self.error), self.remote_peer)

    # -- sending ---------------------------------------------------------------------------------------------------

    @property
    def queue_is_full(self) -> bool:
        unsent = len(self._unsent) if self._unsent is not None else 0
        return self.session.output_bytes + unsent >= self._queue_bytes

    async def wait_for_room(self) -> None:
        """Let others run, now and then; wait in line while the queue is full."""
        self._unyielded += self._queue_bytes
        if self._unyielded > _YIELD_BYTES:
            self._unyielded = 0
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        if self.queue_is_full and self.error is None:
            parked = _Parked()
            self._in_line.append(parked)
            try:
                await parked.wait()
            except trio.Cancelled:
                if parked in self._in_line:
                    self._in_line.remove(parked)
                raise

    def flush(self) -> None:
        """Send what is queued, unless the writer task has the socket: then it follows by itself."""
        if self._unsent is not None or self.error is not None:
            return
        while self.session.output_bytes:
            pieces = self._framing.encrypt(self.session.take_output())
            try:
                sent = self._pipe.try_send(pieces)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._fail(PeerUnreachable(f"connection broke: {error or type(error).__name__}", self.remote_peer))
                return
            if sent < sum(map(len, pieces)):
                self._unsent = memoryview(b"".join(pieces))[sent:]
                self._writer.wake()
                return

    async def _write_loop(self) -> None:
        while True:
            if self._unsent is None:
                await self._writer.wait()
                continue
            await self._pipe.send_all(self._unsent)
            output = self.session.take_output()
            self._unsent = memoryview(b"".join(self._framing.encrypt(output))) if output else None
            if not self.session.output_bytes:
                while self._in_line:
                    self._in_line.popleft().wake()

    # -- receiving -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Carry the streams until the connection ends, whoever ends it. Never raises but for its own cancellation."""
        self._started = True
        self._last_received = trio.current_time()
        error: RemoteError | None = None
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_loop)
                    nursery.start_soon(self._keep_alive)
                    await self._read_loop()
                    nursery.cancel_scope.cancel()
        except* ProtocolViolation as group:
            error = RemoteProtocolError(f"{group.exceptions[0]}", self.remote_peer)
            log.info("connection to …%s ended: %s", self.remote_peer[-6:], error)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as group:
            error = PeerUnreachable(f"connection broke: {group.exceptions[0]}", self.remote_peer)
        finally:
            self._fail(error or PeerUnreachable("the peer closed the connection", self.remote_peer))
            with trio.CancelScope(shield=True):
                await self._pipe.aclose()
            self.closed.set()

    async def _read_loop(self) -> None:
        plaintexts, rest = self._early
        await self._digest(plaintexts)
        buffer = bytearray(_SMALL_READ)
        buffer[: len(rest)] = rest
        start, end = 0, len(rest)
        while True:
            with memoryview(buffer) as view:
                plaintexts, used = self._framing.decrypt(view[start:end])
                start += used
                await self._digest(plaintexts)
                if len(buffer) - end < MAX_FRAME_BYTES or start == end:
                    view[: end - start] = bytes(view[start:end])
                    start, end = 0, end - start
                received = await self._pipe.receive_into(view[end:])
            if not received:
                return
            self._last_received = trio.current_time()
            end += received
            if end == len(buffer) == _SMALL_READ:
                buffer += bytes(_LARGE_READ - len(buffer))

    async def _digest(self, plaintexts: list[bytes]) -> None:
        try:
            for plaintext in plaintexts:
                for event in self.session.receive_data(plaintext):
                    self._on_event(event)
                    if event.kind is EventKind.OPENED and (pause := self._pace(self.remote_peer)):
                        self.flush()
                        await trio.sleep(min(pause, _LONGEST_PAUSE_S))
        finally:
            if self.session.output_bytes:  # answers; after a violation, the GO_AWAY that says so
                self.flush()

    def _on_event(self, event: Event) -> None:
        kind, stream, value = event
        if kind is EventKind.OPENED:
            assert stream is not None
            if not stream.reset:  # taken back in the same breath
                self._on_stream(MuxedStream(self, stream))
        elif kind is EventKind.PONG:
            if self._ping is not None and self._ping[0] == value:
                self.rtt_s = trio.current_time() - self._ping[1]
                self._ping = None
        elif stream is not None and stream.owner is not None:
            owner: MuxedStream = stream.owner
            if kind is EventKind.READABLE:
                owner.wake_reader()
            elif kind is EventKind.WRITABLE:
                owner.wake_writer()
            else:
                owner.wake()

    async def _keep_alive(self) -> None:
        """Ping a silent peer; give it up when it stays silent.

        Four looks per `keep_alive_s`: the first that finds silence is at most two intervals after the last byte, and
        the answer has two more.
        """
        interval = self._config.keep_alive_s / 4
        asked: float | None = None
        while True:
            due = trio.current_time() + interval
            await trio.sleep_until(due)
            now = trio.current_time()
            self.session.expire(now)
            if self._last_received > (asked if asked is not None else due - interval):
                asked = None
            elif asked is None or now - due > interval:  # ask; or our own loop stood still: the silence may be ours
                asked = now
                self._ping = (random.getrandbits(32), now)
                self.session.ping(self._ping[0])
            elif now - asked > interval * 1.5:
                self.on_frozen()
                self._fail(PeerUnreachable(f"peer is silent for {now - self._last_received:.0f} s", self.remote_peer))
                return
            self.flush()

    # -- the end ---------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Say goodbye, let what is queued go out, close. Bounded by `close_s`; idempotent."""
        if self.error is None and self._started:
            with shielded_for(self._config.close_s):
                self.session.go_away(GoAway.NORMAL)
                self.flush()
                while self._unsent is not None and self.error is None:
                    parked = _Parked()
                    self._in_line.append(parked)
                    await parked.wait()
                # A socket closed with unread bytes takes back what it sent last; so let the peer close first.
                with contextlib.suppress(OSError, trio.ClosedResourceError):  # gone already
                    await self._pipe.send_eof()
                await self.closed.wait()
        self._fail(PeerUnreachable("this end closed the connection", self.remote_peer))
        with trio.CancelScope(shield=True):
            if self._started:
                await self.closed.wait()
            else:
                await self._pipe.aclose()
                self.closed.set()

    def _fail(self, error: RemoteError) -> None:
        if self.error is None:
            self.error = error
            for stream in list(self.session.streams.values()):
                if stream.owner is not None:  # None: opened in the same breath that broke a rule; nobody has it yet
                    stream.owner.wake()
            while self._in_line:
                self._in_line.popleft().wake()
            self._scope.cancel()
