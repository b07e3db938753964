from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.protocols.errors import ProtocolViolation
from petals.protocols.framing import FrameDecoder, encode_frame, encode_varint


@given(payloads=st.lists(st.binary(max_size=300)), cut=st.integers(1, 64))
def test_messages_survive_any_slicing(payloads: list[bytes], cut: int) -> None:
    decoder, got, wire = FrameDecoder(300), [], b"".join(map(encode_frame, payloads))
    for start in range(0, len(wire), cut):
        decoder.receive_data(wire[start : start + cut])
        while (frame := decoder.next_frame()) is not None:
            got.append(frame)
    assert got == payloads
    assert decoder.is_empty()


@given(value=st.integers(0, 2**63 - 1))
def test_varints_are_what_multiformats_says(value: int) -> None:
    encoded = encode_varint(value)
    assert sum((byte & 0x7F) << 7 * index for index, byte in enumerate(encoded)) == value
    assert [byte >> 7 for byte in encoded] == [1] * (len(encoded) - 1) + [0]


def test_known_varints() -> None:
    assert [encode_varint(value).hex() for value in (0, 1, 127, 128, 300, 16384)] == [
        "00", "01", "7f", "8001", "ac02", "808001",
    ]  # fmt: skip


@given(message=st.binary(min_size=1, max_size=50), rest=st.binary(max_size=50), taken=st.integers(1, 60))
def test_what_follows_a_message_can_be_taken_and_put_back(message: bytes, rest: bytes, taken: int) -> None:
    decoder = FrameDecoder(100)
    decoder.receive_data(encode_frame(message) + rest)
    assert decoder.next_frame() == message
    first = decoder.take_rest(taken)
    assert first == rest[:taken]
    decoder.put_back(first)
    assert decoder.take_rest(100) == rest


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        (encode_varint(101), "at least 101 bytes"),
        (encode_varint(2**62), "the limit is 100"),
        (b"\x80" * 9, "no varint"),
        (b"\x81\x00", "shortest"),
    ],
)
def test_bad_lengths_are_refused_before_the_message_is_here(wire: bytes, why: str) -> None:
    decoder = FrameDecoder(100)
    decoder.receive_data(wire)
    with pytest.raises(ProtocolViolation, match=why):
        decoder.next_frame()
