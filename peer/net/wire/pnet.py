"""A swarm behind a pre-shared key, as libp2p's specs have it (pnet/Private-Networks-PSK-V1.md). Does no I/O.

The wire: each end first says 24 random bytes, its nonce. Everything else it says, from the first multistream line on,
is XORed with XSalsa20's key stream under the key that the swarm shares and that nonce. Inside of it Noise runs as
always: this layer keeps strangers out, Noise keeps everybody else out. It proves nothing by itself, so a peer with
another key is known by its first words: they are not those that every libp2p connection begins with.

XSalsa20 is Salsa20 under a key derived from the key and 16 bytes of the nonce by HSalsa20 (Bernstein, "Extending the
Salsa20 nonce", 2011), with the last 8 bytes as its nonce. The derivation runs once per connection and direction and is
ours; the stream is pycryptodome's. py-libp2p's own pnet (0.8.1) is Salsa20 with an 8-byte nonce, which only itself
understands.

A key stream is a counter: what was ciphered must go out, whole, in order and once. So both calls here are plain ones
that cannot be interrupted, and pnet_stream.py keeps what it could not send.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from dataclasses import dataclass, field

from Crypto.Cipher import Salsa20

from petals.protocols.errors import ProtocolViolation, UserError

KEY_BYTES = 32
NONCE_BYTES = 24
MAX_KEY_FILE_BYTES = 1024
_HEADER = b"/key/swarm/psk/1.0.0/"
_ROUNDS = 20
_SIGMA = struct.unpack("<4I", b"expand 32-byte k")
_QUARTERS = (
    (0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11),  # columns
    (0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14),  # rows
)  # fmt: skip


class WrongSwarmKey(ProtocolViolation):
    """The other end speaks, but not under our key."""

    def __init__(self) -> None:
        super().__init__("the peer there has another swarm key, or none")


@dataclass(frozen=True, slots=True)
class SwarmKey:
    """What the peers of a private swarm share. Who has it is in."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a swarm key has {KEY_BYTES} bytes")

    @property
    def fingerprint(self) -> str:
        """Names the key without telling anything about it; for people who compare."""
        return hashlib.sha256(b"petals/swarm-key\n" + self.secret).hexdigest()[:16]


def encode_swarm_key(key: SwarmKey) -> bytes:
    """The file that go-libp2p, js-libp2p and IPFS read."""
    return _HEADER + b"\n/base16/\n" + key.secret.hex().encode() + b"\n"


def parse_swarm_key(data: bytes) -> SwarmKey:
    """Read such a file, in any of the three encodings.

    Raises:
        UserError: it is none. The message quotes nothing of it.
    """
    header, _, rest = data[:MAX_KEY_FILE_BYTES].partition(b"\n")
    encoding, _, text = rest.partition(b"\n")
    try:
        if header.rstrip(b"\r") != _HEADER:
            raise ValueError
        match encoding.rstrip(b"\r"):
            case b"/base16/":
                return SwarmKey(bytes.fromhex(text.strip().decode("ascii")))
            case b"/base64/":
                return SwarmKey(base64.b64decode(text.strip(), validate=True))
            case b"/bin/":
                return SwarmKey(text[:KEY_BYTES])
        raise ValueError
    except (ValueError, binascii.Error):
        raise UserError(f"no swarm key ({_HEADER.decode()}); make one with: petals keygen --swarm FILE") from None


def hsalsa20(key: bytes, nonce: bytes) -> bytes:
    """32 bytes of key and 16 of nonce -> 32 bytes: Salsa20's rounds without the final addition, the diagonal and the
    middle of the matrix."""
    k, n = struct.unpack("<8I", key), struct.unpack("<4I", nonce)
    x = [_SIGMA[0], *k[:4], _SIGMA[1], *n, _SIGMA[2], *k[4:], _SIGMA[3]]
    for _ in range(_ROUNDS // 2):
        for a, b, c, d in _QUARTERS:
            x[b] ^= _rotated(x[a] + x[d], 7)
            x[c] ^= _rotated(x[b] + x[a], 9)
            x[d] ^= _rotated(x[c] + x[b], 13)
            x[a] ^= _rotated(x[d] + x[c], 18)
    return struct.pack("<8I", *(x[i] for i in (0, 5, 10, 15, 6, 7, 8, 9)))


def _rotated(value: int, bits: int) -> int:
    value &= 0xFFFFFFFF
    return (value << bits | value >> 32 - bits) & 0xFFFFFFFF


def xsalsa20(key: SwarmKey, nonce: bytes) -> Salsa20.Salsa20Cipher:
    """The stream of one direction."""
    return Salsa20.new(key=hsalsa20(key.secret, nonce[:16]), nonce=nonce[16:])


def make_nonce(random: bytes) -> bytes:
    """24 random bytes -> a nonce that a peer without a key takes for the length of a line, and for far too long a one.

    Else half of all nonces would look to it like a short line that has not come yet, and it would wait. 187 random bits
    are left, and a nonce need only be new.
    """
    long = bytes(byte | 0x80 for byte in random[:3]) + bytes([random[3] & 0x7F | 1])  # a varint of 2^21 or more
    return long + random[4:NONCE_BYTES]


class SwarmCipher:
    """Both directions of one connection.

    Args:
        nonce: 24 random bytes, never used before under this key; to be sent in the clear before anything else.
    """

    def __init__(self, key: SwarmKey, nonce: bytes) -> None:
        if len(nonce) != NONCE_BYTES:
            raise ValueError(f"a nonce has {NONCE_BYTES} bytes")
        self.nonce = nonce
        self._key = key
        self._out = xsalsa20(key, nonce)
        self._in: Salsa20.Salsa20Cipher | None = None
        self._heard = bytearray()

    def nonce_wanted(self) -> int:
        """How many bytes of the other end's nonce are still to come."""
        return NONCE_BYTES - len(self._heard)

    def receive_nonce(self, data: bytes) -> None:
        """At most `nonce_wanted()` bytes, as they came."""
        assert len(data) <= self.nonce_wanted()
        self._heard += data
        if not self.nonce_wanted():
            self._in = xsalsa20(self._key, bytes(self._heard))

    def seal(self, data: bytes | bytearray | memoryview) -> bytes:
        """What to send instead of `data`, next."""
        return self._out.encrypt(data)

    def open(self, view: memoryview) -> None:
        """Turn what came next into what was said, in its place. The nonce must have come."""
        assert self._in is not None
        self._in.decrypt(view, output=view)
