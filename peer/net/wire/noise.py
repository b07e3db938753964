"""Noise transport messages, after the handshake: ciphertext in, plaintext out, and back. Does no I/O.

The wire (libp2p specs, noise/README.md "Wire format"; Noise specification rev. 34, sections 5.1 and 12.3):

    uint16 big-endian length | ciphertext, `length` bytes, of which the last 16 are the Poly1305 tag

A message is at most 65,535 bytes, so at most 65,519 of plaintext. Each direction has its own key and its own counter:
the nonce is four zero bytes and the counter, little-endian. Both ends must count alike, which is why one object owns a
direction and no call of it can be interrupted: `encrypt` counts and returns everything, or raises before it counts.
The counter cannot wrap: 2^64 messages at a million per second are half a million years.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from petals.protocols.errors import ProtocolViolation

TAG_BYTES = 16
LENGTH_BYTES = 2
MAX_MESSAGE_BYTES = 65535
MAX_PLAINTEXT_BYTES = MAX_MESSAGE_BYTES - TAG_BYTES
MAX_FRAME_BYTES = LENGTH_BYTES + MAX_MESSAGE_BYTES

_nonce = struct.Struct("<4xQ").pack
_length = struct.Struct(">H")


class NoiseFraming:
    """One connection's two ciphers and their counters.

    Args:
        send_key, receive_key: 32 bytes each, the two halves of the handshake's split.
    """

    def __init__(self, send_key: bytes, receive_key: bytes) -> None:
        self._send, self._receive = ChaCha20Poly1305(send_key), ChaCha20Poly1305(receive_key)
        self._sent = self._received = 0
        self.cipher_s = 0.0
        """Seconds spent in both ciphers so far."""

    def encrypt(self, plaintext: Iterable[bytes]) -> list[bytes]:
        """All of `plaintext` as whole frames, in pieces to be sent in this order.

        Short neighbours share a message; a piece that fills one is encrypted where it lies.
        """
        began = time.perf_counter()
        wire: list[bytes] = []
        batch: list[bytes] = []
        size = 0
        for piece in plaintext:
            if batch and size + len(piece) > MAX_PLAINTEXT_BYTES:
                self._encrypt(batch, wire)
                batch, size = [], 0
            batch.append(piece)
            size += len(piece)
        if size:
            self._encrypt(batch, wire)
        self.cipher_s += time.perf_counter() - began
        return wire

    def _encrypt(self, batch: list[bytes], wire: list[bytes]) -> None:
        whole = memoryview(batch[0] if len(batch) == 1 else b"".join(batch))
        for start in range(0, len(whole), MAX_PLAINTEXT_BYTES):
            message = self._send.encrypt(_nonce(self._sent), whole[start : start + MAX_PLAINTEXT_BYTES], None)
            self._sent += 1
            wire += (_length.pack(len(message)), message)

    def decrypt(self, wire: memoryview) -> tuple[list[bytes], int]:
        """Everything that is whole in `wire`: the plaintexts, and how many bytes of `wire` they took.

        Raises:
            ProtocolViolation: a message is too short for its tag or was forged. The connection cannot go on.
        """
        began = time.perf_counter()
        plaintexts: list[bytes] = []
        position, size = 0, len(wire)
        while size - position >= LENGTH_BYTES:
            (length,) = _length.unpack_from(wire, position)
            end = position + LENGTH_BYTES + length
            if length < TAG_BYTES:
                raise ProtocolViolation(f"Noise message of {length} bytes, shorter than its tag")
            if end > size:
                break
            try:
                plaintext = self._receive.decrypt(_nonce(self._received), wire[position + LENGTH_BYTES : end], None)
            except InvalidTag:
                raise ProtocolViolation(
                    "Noise message does not authenticate: forged, repeated or out of order"
                ) from None
            self._received += 1
            plaintexts.append(plaintext)
            position = end
        self.cipher_s += time.perf_counter() - began
        return plaintexts, position
