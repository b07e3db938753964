"""multistream-select without a network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.peer.net.wire.multistream import MULTISTREAM, Dialler, Listener, encode_line, proposal
from petals.protocols.errors import ProtocolViolation


@given(cut=st.integers(1, 40), rest=st.binary(max_size=20))
def test_both_ends_agree_and_leave_what_follows_alone(cut: int, rest: bytes) -> None:
    dialler, listener = Dialler("/yamux/1.0.0"), Listener({"/other", "/yamux/1.0.0"})
    wire = proposal("/yamux/1.0.0") + rest
    chosen, answer = None, b""
    for start in range(0, len(wire), cut):
        listener.receive_data(wire[start : start + cut])
        chosen = chosen or listener.chosen()
        answer += listener.take_output()
    assert chosen == "/yamux/1.0.0"
    assert listener.rest() == rest
    assert answer == proposal("/yamux/1.0.0")
    dialler.receive_data(answer + rest)
    assert dialler.agreed() is True
    assert dialler.rest() == rest


def test_reading_only_what_is_wanted_takes_nothing_else() -> None:
    listener, wire = Listener({"/a"}), bytearray(proposal("/a") + b"rest")
    while listener.chosen() is None:
        n = listener.wanted()
        listener.receive_data(wire[:n])
        del wire[:n]
    assert wire == b"rest"


def test_a_refusal_can_be_followed_by_another_proposal() -> None:
    listener = Listener({"/b"})
    listener.receive_data(proposal("/a"))
    assert listener.chosen() is None
    assert listener.take_output() == encode_line(MULTISTREAM) + encode_line("na")
    listener.receive_data(encode_line("/b"))
    assert listener.chosen() == "/b"
    dialler = Dialler("/a")
    dialler.receive_data(encode_line(MULTISTREAM) + encode_line("na"))
    assert dialler.agreed() is False


@pytest.mark.parametrize(
    "wire",
    [
        encode_line("/multistream/0.9.0"),
        encode_line("x" * 2000),
        b"\x03abc",
        b"\x03\xff\xfe\n",
        encode_line(MULTISTREAM) + b"".join(encode_line(f"/guess/{n}") for n in range(20)),
        b"GET / HTTP/1.1\r\n" * 100,
    ],
)
def test_nonsense_is_a_violation(wire: bytes) -> None:
    listener = Listener({"/a"})
    listener.receive_data(wire)
    with pytest.raises(ProtocolViolation):
        listener.chosen()


def test_an_answer_nobody_asked_for_is_a_violation() -> None:
    dialler = Dialler("/a")
    dialler.receive_data(encode_line(MULTISTREAM) + encode_line("/c"))
    with pytest.raises(ProtocolViolation):
        dialler.agreed()
