"""The yamux machine without a network: against a model under random schedules, and against hostile frames."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals.peer.net.wire.yamux import (
    HEADER,
    INITIAL_WINDOW,
    Event,
    EventKind,
    Flag,
    FrameType,
    GoAway,
    YamuxLimits,
    YamuxSession,
    YamuxStream,
)
from petals.protocols.errors import LocalProtocolError, ProtocolViolation

DATA, WINDOW, PING, GO_AWAY = FrameType
SYN, ACK, FIN, RST = Flag


def frame(kind: int, flags: int, stream_id: int, length: int, body: bytes = b"", version: int = 0) -> bytes:
    return HEADER.pack(version, kind, flags, stream_id, length) + body


def frames_of(wire: bytes) -> list[tuple[int, int, int, int]]:
    """(type, flags, stream id, length) of each frame; bodies are skipped."""
    found, position = [], 0
    while position < len(wire):
        _, kind, flags, stream_id, length = HEADER.unpack_from(wire, position)
        found.append((kind, flags, stream_id, length))
        position += HEADER.size + (length if kind == DATA else 0)
    return found


# -- a model ---------------------------------------------------------------------------------------------------------


@dataclass
class End:
    """One end of one stream as the model sees it: plain byte strings, no frames, no windows."""

    stream: YamuxStream
    written: bytearray = field(default_factory=bytearray)
    read: bytearray = field(default_factory=bytearray)
    finished: bool = False


class World:
    """Two machines, two wires that deliver in slices of any size, and the model of every stream between them."""

    def __init__(self, seed: int, limits: YamuxLimits) -> None:
        self.dice = random.Random(seed)
        self.sessions = YamuxSession(is_client=True, limits=limits), YamuxSession(is_client=False, limits=limits)
        self.wires = bytearray(), bytearray()
        self.ends: dict[int, list[End | None]] = {}
        self.broken: set[int] = set()

    def pick(self, side: int) -> End | None:
        ends = [pair[side] for pair in self.ends.values() if pair[side] is not None]
        return self.dice.choice(ends) if ends else None

    def open(self, side: int) -> None:
        stream = self.sessions[side].open_stream()
        pair: list[End | None] = [None, None]
        pair[side] = End(stream)
        self.ends[stream.id] = pair

    def write(self, side: int) -> None:
        end = self.pick(side)
        if end is not None and not end.finished and not end.stream.reset:
            data = self.dice.randbytes(self.dice.choice([1, 100, 5000, 70_000, 300_000]))
            taken = self.sessions[side].write(end.stream, memoryview(data))
            end.written += data[:taken]  # a write cut here has queued whole frames, nothing else

    def read(self, side: int) -> None:
        end = self.pick(side)
        if end is not None:
            end.read += self.sessions[side].read(end.stream, self.dice.choice([1, 100, 5000, 70_000, 1 << 20]))

    def finish(self, side: int) -> None:
        end = self.pick(side)
        if end is not None and not end.stream.reset:
            end.finished = True
            self.sessions[side].close_write(end.stream)

    def reset(self, side: int) -> None:
        end = self.pick(side)
        if end is not None and self.dice.random() < 0.2:
            self.broken.add(end.stream.id)
            self.sessions[side].reset(end.stream)

    def ping(self, side: int) -> None:
        self.sessions[side].ping(self.dice.getrandbits(32))

    def deliver(self, side: int, everything: bool = False) -> None:
        self.wires[side].extend(b"".join(self.sessions[side].take_output()))
        wire = self.wires[side]
        size = len(wire) if everything else self.dice.choice([1, 5, 11, 12, 13, 1000, 65_519, len(wire)])
        data = bytes(wire[:size])
        del wire[:size]
        for event in self.sessions[1 - side].receive_data(data):
            if event.kind is EventKind.OPENED:
                assert event.stream is not None
                self.ends[event.stream.id][1 - side] = End(event.stream)

    def check(self) -> None:
        for session in self.sessions:
            live = [end.stream for pair in self.ends.values() for end in pair if end is not None]
            mine = [stream for stream in live if session.streams.get(stream.id) is stream]
            assert session.granted == sum(stream.target_window for stream in mine)
            for stream in mine:
                assert stream.inbox_bytes == sum(map(len, stream.inbox))
                assert stream.inbox_bytes + stream.receive_window <= stream.target_window
                assert stream.target_window <= session.limits.max_window
        for pair in self.ends.values():
            for near, far in (pair, pair[::-1]):
                if near is not None and far is not None:
                    assert near.written.startswith(far.read)

    def settle(self) -> None:
        """Deliver and read until nothing moves any more."""
        for _ in range(10_000):
            before = sum(len(end.read) for pair in self.ends.values() for end in pair if end)
            for side in (0, 1):
                self.deliver(side, everything=True)
                for pair in self.ends.values():
                    if (end := pair[side]) is not None:
                        end.read += self.sessions[side].read(end.stream, 1 << 20)
            after = sum(len(end.read) for pair in self.ends.values() for end in pair if end)
            if before == after and not any(s.output_bytes + s.buffered for s in self.sessions) and not any(self.wires):
                return
        raise AssertionError("never comes to rest")


ACTIONS = ["open", "write", "write", "write", "read", "read", "read", "finish", "reset", "ping", "deliver", "deliver"]


@settings(max_examples=120, deadline=None)
@given(
    schedule=st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1)), min_size=10, max_size=150),
    seed=st.integers(0, 2**32),
    max_window=st.sampled_from([INITIAL_WINDOW, 1 << 20]),
)
def test_random_schedules_agree_with_the_model(schedule: list[tuple[str, int]], seed: int, max_window: int) -> None:
    world = World(seed, YamuxLimits(max_window=max_window))
    world.open(0)
    for action, side in schedule:
        getattr(world, action)(side)
        world.check()
    world.settle()
    world.check()
    for stream_id, pair in world.ends.items():
        for near, far in (pair, pair[::-1]):
            if stream_id not in world.broken:
                assert near is not None
                assert far is not None
                assert far.read == near.written
                assert far.stream.remote_closed == near.finished
    for side, session in enumerate(world.sessions):
        assert session.buffered == 0
        still_open = {
            stream_id
            for stream_id, pair in world.ends.items()
            if stream_id not in world.broken and not all(end and end.finished for end in pair)
        }
        assert set(session.streams) == still_open, side


# -- hostile frames --------------------------------------------------------------------------------------------------

OPEN = frame(WINDOW, SYN, 1, 0)

HOSTILE = {
    "version": frame(PING, SYN, 0, 0, version=1),
    "type": frame(4, 0, 0, 0),
    "flag": frame(WINDOW, 16, 1, 0),
    "ping on a stream": frame(PING, SYN, 1, 0),
    "ping without a flag": frame(PING, 0, 0, 0),
    "ping with two flags": frame(PING, SYN | ACK, 0, 0),
    "go-away on a stream": frame(GO_AWAY, 0, 3, 0),
    "data on stream 0": frame(DATA, 0, 0, 1, b"x"),
    "data on an unknown stream": frame(DATA, 0, 1, 1, b"x"),
    "data on a stream we never opened": frame(DATA, 0, 2, 1, b"x"),
    "window of an unknown stream": frame(WINDOW, 0, 5, 1),
    "stream of our own number": frame(WINDOW, SYN, 2, 0),
    "stream opened twice": OPEN + OPEN,
    "more than the window": OPEN + frame(DATA, 0, 1, INITIAL_WINDOW + 1),
    "more than the rest of the window": OPEN
    + frame(DATA, 0, 1, INITIAL_WINDOW, bytes(INITIAL_WINDOW))
    + frame(DATA, 0, 1, 1),
    "four gigabytes": OPEN + frame(DATA, 0, 1, 2**32 - 1),
    "four gigabytes for a stream that is over": OPEN + frame(WINDOW, RST, 1, 0) + frame(DATA, 0, 1, 2**32 - 1),
    "a window beyond 32 bits": OPEN + frame(WINDOW, 0, 1, 2**32 - 1),
    "data after the end": OPEN + frame(WINDOW, FIN, 1, 0) + frame(DATA, 0, 1, 1, b"x"),
}  # fmt: skip


@pytest.mark.parametrize("wire", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("cut", [1, 7, 1 << 30])
def test_hostile_frames_end_the_session_with_a_reason(wire: bytes, cut: int) -> None:
    session = YamuxSession(is_client=False)

    def receive() -> None:
        for start in range(0, len(wire), cut):
            session.receive_data(wire[start : start + cut])

    with pytest.raises(ProtocolViolation, match="yamux"):
        receive()
    assert (GO_AWAY, 0, 0, GoAway.PROTOCOL_ERROR) in frames_of(b"".join(session.take_output()))


def test_a_flood_of_streams_is_refused_one_by_one() -> None:
    session = YamuxSession(is_client=False, limits=YamuxLimits(max_streams=10))
    events: list[Event] = []
    for n in range(100):
        events += session.receive_data(frame(DATA, SYN, 2 * n + 1, 3, b"abc"))
    assert [event.kind for event in events].count(EventKind.OPENED) == 10
    assert frames_of(b"".join(session.take_output()))[10:] == [(WINDOW, RST, 2 * n + 1, 0) for n in range(10, 100)]
    session.receive_data(frame(WINDOW, RST, 1, 0))  # room again
    assert session.receive_data(frame(WINDOW, SYN, 999, 0))[0].kind is EventKind.OPENED


def test_a_peer_that_asks_and_does_not_read_is_thrown_out() -> None:
    session = YamuxSession(is_client=False)
    with pytest.raises(ProtocolViolation, match="does not read"):
        session.receive_data(frame(PING, SYN, 0, 7) * 100_000)
    assert session.output_bytes < 2 << 20


def test_unread_bytes_are_bounded_by_costing_the_stream_that_exceeds() -> None:
    limits = YamuxLimits(buffer_bytes=1 << 20)
    session = YamuxSession(is_client=False, limits=limits)
    resets = []
    for n in range(6):
        wire = frame(DATA, SYN, 2 * n + 1, INITIAL_WINDOW, bytes(INITIAL_WINDOW))
        resets += [event.stream for event in session.receive_data(wire) if event.kind is EventKind.RESET]
    assert [stream.id for stream in resets if stream] == [9, 11]
    assert session.buffered == 1 << 20
    assert len(session.streams) == 4


def test_single_bytes_do_not_cost_their_whole_message_each() -> None:
    """One byte for a stream and 60 kB to throw away, a thousand times: the byte is kept, its message is not."""
    session = YamuxSession(is_client=False)
    session.receive_data(frame(WINDOW, SYN, 1, 0) + frame(WINDOW, SYN, 3, 0) + frame(WINDOW, RST, 3, 0))
    tracemalloc.start()
    try:
        for _ in range(1000):
            session.receive_data(frame(DATA, 0, 1, 1, b"x") + frame(DATA, 0, 3, 60_000, bytes(60_000)))
        current, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert session.streams[1].inbox_bytes == 1000
    assert current < 200_000


# -- windows and endings ---------------------------------------------------------------------------------------------


def test_a_window_grows_only_for_a_reader_that_reads() -> None:
    client, server = YamuxSession(is_client=True), YamuxSession(is_client=False)
    near = client.open_stream()
    far = server.receive_data(b"".join(client.take_output()))[0].stream
    assert far is not None
    for _ in range(10):
        while client.write(near, memoryview(bytes(65_000))):
            server.receive_data(b"".join(client.take_output()))
        assert far.target_window == INITIAL_WINDOW  # nothing was read
    sizes = []
    for _ in range(8):
        while server.read(far, 1 << 20):
            pass
        client.receive_data(b"".join(server.take_output()))
        sizes.append(far.target_window)
        assert near.send_window == far.receive_window
        while client.write(near, memoryview(bytes(65_000))):
            server.receive_data(b"".join(client.take_output()))
    assert sizes[0] > INITIAL_WINDOW
    assert sizes == sorted(sizes)
    assert sizes[-1] == server.limits.max_window


def test_windows_do_not_grow_beyond_the_connections_budget() -> None:
    session = YamuxSession(is_client=False, limits=YamuxLimits(buffer_bytes=4 * INITIAL_WINDOW))
    for stream_id in (1, 3, 5, 7):
        session.receive_data(frame(WINDOW, SYN, stream_id, 0))
    for stream_id in (1, 3, 5, 7):
        for _ in range(5):
            stream = session.streams[stream_id]
            session.receive_data(frame(DATA, 0, stream_id, 200_000, bytes(200_000)))
            while session.read(stream, 1 << 20):
                pass
        assert stream.target_window == INITIAL_WINDOW


def test_a_closed_reader_tells_a_peer_that_keeps_writing() -> None:
    session = YamuxSession(is_client=False)
    session.receive_data(OPEN)
    stream = session.streams[1]
    session.close_write(stream)
    session.close_read(stream, now=0.0)
    session.take_output()
    session.receive_data(frame(DATA, 0, 1, 1000, bytes(1000)))
    assert frames_of(b"".join(session.take_output())) == []  # what was under way may come
    session.receive_data(frame(DATA, 0, 1, 200_000, bytes(200_000)))
    assert frames_of(b"".join(session.take_output())) == [(WINDOW, RST, 1, 0)]
    assert session.streams == {}
    assert session.buffered == 0


def test_an_end_that_never_comes_is_not_waited_for_for_ever() -> None:
    session = YamuxSession(is_client=False, limits=YamuxLimits(linger_s=60))
    session.receive_data(OPEN)
    session.close_write(session.streams[1])
    session.close_read(session.streams[1], now=100.0)
    session.take_output()
    session.expire(now=159.0)
    assert 1 in session.streams
    session.expire(now=160.0)
    assert session.streams == {}
    assert frames_of(b"".join(session.take_output())) == [(WINDOW, RST, 1, 0)]


def test_go_away_stops_new_streams_and_leaves_the_open_ones() -> None:
    session = YamuxSession(is_client=False)
    session.receive_data(OPEN)
    session.receive_data(frame(GO_AWAY, 0, 0, 0))
    with pytest.raises(LocalProtocolError):
        session.open_stream()
    assert session.write(session.streams[1], memoryview(b"still here")) == 10
    session.go_away()
    session.take_output()
    session.receive_data(frame(WINDOW, SYN, 3, 0))
    assert frames_of(b"".join(session.take_output())) == [(WINDOW, RST, 3, 0)]


def test_data_under_way_to_a_stream_we_reset_is_dropped() -> None:
    session = YamuxSession(is_client=False)
    session.receive_data(OPEN)
    stream = session.streams[1]
    session.reset(stream)
    assert session.receive_data(frame(DATA, FIN, 1, 5, b"hello")) == []
    with pytest.raises(LocalProtocolError):
        session.write(stream, memoryview(b"x"))


def test_the_rest_of_a_body_is_dropped_when_its_stream_is_reset_in_the_middle() -> None:
    session = YamuxSession(is_client=False)
    session.receive_data(OPEN + frame(DATA, 0, 1, 10, b"01234"))
    stream = session.streams[1]
    session.reset(stream)
    assert session.receive_data(b"56789") == []
    assert session.read(stream, 10) == b""
    assert session.buffered == 0
