"""Noise framing without a network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from noise.backends.default import noise_backend
from noise.noise_protocol import NoiseProtocol
from noise.state import CipherState

from petals.peer.net.wire.noise import MAX_PLAINTEXT_BYTES, NoiseFraming
from petals.protocols.errors import ProtocolViolation

KEYS = bytes(range(32)), bytes(range(32, 64))


def pair() -> tuple[NoiseFraming, NoiseFraming]:
    return NoiseFraming(*KEYS), NoiseFraming(*reversed(KEYS))


@given(messages=st.lists(st.binary(min_size=1, max_size=3000), max_size=8), cuts=st.lists(st.integers(1, 4000)))
def test_plaintext_survives_any_slicing(messages: list[bytes], cuts: list[int]) -> None:
    near, far = pair()
    wire = bytearray(b"".join(piece for message in messages for piece in near.encrypt([message])))
    arrived, got = bytearray(), bytearray()
    while wire:
        cut = cuts.pop() if cuts else len(wire)
        arrived += wire[:cut]
        del wire[:cut]
        plaintexts, used = far.decrypt(memoryview(bytes(arrived)))
        got += b"".join(plaintexts)
        del arrived[:used]
    assert got == b"".join(messages)
    assert not arrived


def test_long_data_becomes_full_messages() -> None:
    near, far = pair()
    data = bytes(3 * MAX_PLAINTEXT_BYTES + 5)
    plaintexts, used = far.decrypt(memoryview(wire := b"".join(near.encrypt([data]))))
    assert [len(plaintext) for plaintext in plaintexts] == [MAX_PLAINTEXT_BYTES] * 3 + [5]
    assert used == len(wire)


def test_the_cipher_is_the_librarys() -> None:
    """Against noiseprotocol's own CipherState, which the handshake's other end may be using."""
    near, _ = pair()
    theirs = CipherState(NoiseProtocol(b"Noise_XX_25519_ChaChaPoly_SHA256", backend=noise_backend))
    theirs.initialize_key(KEYS[0])
    for message in (b"first", b"second", b""):
        wire = b"".join(near.encrypt([message]))
        if message:
            assert theirs.decrypt_with_ad(None, wire[2:]) == message
        else:
            assert wire == b""


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda wire: wire[:-1] + bytes([wire[-1] ^ 1]), "authenticate"),
        (lambda wire: wire[:2] + bytes([wire[2] ^ 1]) + wire[3:], "authenticate"),
        (lambda wire: wire + wire, "authenticate"),  # repeated
        (lambda wire: b"\x00\x0f" + bytes(15), "shorter than its tag"),
        (lambda wire: b"\x00\x00", "shorter than its tag"),
    ],
)
def test_spoilt_ciphertext_is_a_violation(spoil, why: str) -> None:  # type: ignore[no-untyped-def]
    near, far = pair()
    with pytest.raises(ProtocolViolation, match=why):
        far.decrypt(memoryview(spoil(b"".join(near.encrypt([b"payload"])))))


def test_a_cut_message_waits_for_its_rest() -> None:
    near, far = pair()
    wire = b"".join(near.encrypt([b"payload"]))
    assert far.decrypt(memoryview(wire)[:-1]) == ([], 0)
    assert far.decrypt(memoryview(wire)) == ([b"payload"], len(wire))


def test_short_neighbours_share_a_message() -> None:
    near, far = pair()
    frames = [b"a" * 12, b"b" * 12, b"c" * MAX_PLAINTEXT_BYTES, b"d", b"e"]
    plaintexts, _ = far.decrypt(memoryview(b"".join(near.encrypt(frames))))
    assert plaintexts == [b"a" * 12 + b"b" * 12, b"c" * MAX_PLAINTEXT_BYTES, b"de"]
    assert near.encrypt([]) == []
