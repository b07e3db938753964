"""Public keys of strangers: which are accepted, and what a check of a signature costs at most.

Theory. Whoever sends a signed message chooses the key that it is verified with. An RSA signature is verified by raising
it to the key's exponent e: with e = 65537 that is 17 multiplications, with an e as long as the modulus thousands. An
8,192-bit modulus costs four times a 4,096-bit one. So the sender would choose how long we compute. Accepted are
therefore Ed25519 and RSA of 2,048 to 4,096 bits with e = 65537 (what every libp2p implementation generates): at most
about 0.1 ms each. The size of the encoding is checked before it is parsed.

py-libp2p (0.8.1) parses and verifies RSA keys of any exponent in Python, in the Noise handshake, in identify and in
signed peer records. `limit_library` puts the class below in its place.
"""

from __future__ import annotations

from typing import cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey as OpenSslKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from libp2p.crypto.ed25519 import Ed25519PublicKey
from libp2p.crypto.keys import KeyType, PublicKey
from libp2p.crypto.pb import crypto_pb2
from libp2p.crypto.rsa import RSAPublicKey as LibraryRsaPublicKey
from libp2p.crypto.serialization import key_type_to_public_key_deserializer

MIN_RSA_BITS = 2048
"""As the libp2p specification asks (peer-ids/peer-ids.md): shorter ones can be factored."""
MAX_RSA_BITS = 4096
RSA_EXPONENT = 65537
MAX_KEY_BYTES = 640
"""A 4,096-bit RSA key takes 554 bytes in libp2p's protobuf form."""


class RsaPublicKey(PublicKey):
    """An RSA key of bounded cost, verified by OpenSSL.

    Raises:
        ValueError: the key is too long, too short, or has another exponent than 65537.
    """

    def __init__(self, impl: OpenSslKey) -> None:
        if not MIN_RSA_BITS <= impl.key_size <= MAX_RSA_BITS:
            raise ValueError(f"RSA key of {impl.key_size} bits; accepted are {MIN_RSA_BITS} to {MAX_RSA_BITS}")
        if impl.public_numbers().e != RSA_EXPONENT:
            raise ValueError(f"RSA key with another exponent than {RSA_EXPONENT}")
        self._impl = impl

    @classmethod
    def from_bytes(cls, data: bytes) -> RsaPublicKey:
        """A key in DER (PKIX, or PKCS 1). Raises ValueError as the class does, and for garbage."""
        if len(data) > MAX_KEY_BYTES:
            raise ValueError(f"public key of {len(data)} bytes, at most {MAX_KEY_BYTES}")
        impl = load_der_public_key(data)
        if not isinstance(impl, OpenSslKey):
            raise ValueError("no RSA key")
        return cls(impl)

    def to_bytes(self) -> bytes:
        """DER, PKIX."""
        return self._impl.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def get_type(self) -> KeyType:
        """RSA."""
        return KeyType.RSA

    def verify(self, data: bytes, signature: bytes) -> bool:
        """Whether `signature` (PKCS 1 v1.5, SHA-256) over `data` is this key's."""
        try:
            self._impl.verify(signature, data, PKCS1v15(), SHA256())
        except InvalidSignature:
            return False
        return True


def parse_public_key(data: bytes) -> PublicKey:
    """The key in libp2p's protobuf form.

    Raises:
        ValueError: garbage, too large, or neither Ed25519 nor RSA of bounded cost; also other errors of the parsers.
    """
    if len(data) > MAX_KEY_BYTES:
        raise ValueError(f"public key of {len(data)} bytes, at most {MAX_KEY_BYTES}")
    message = crypto_pb2.PublicKey.FromString(data)
    if message.key_type == crypto_pb2.KeyType.Ed25519:
        return cast(PublicKey, Ed25519PublicKey.from_bytes(message.data))
    if message.key_type == crypto_pb2.KeyType.RSA:
        return RsaPublicKey.from_bytes(message.data)
    raise ValueError("neither an Ed25519 nor an RSA key")


def limit_library() -> None:
    """Have py-libp2p take RSA keys of bounded cost only, wherever it parses one, in the whole process.

    Its handshake and identify look the parser up in a table; signed peer records and public-key records call the class.
    """
    key_type_to_public_key_deserializer[KeyType.RSA.value] = RsaPublicKey.from_bytes
    LibraryRsaPublicKey.from_bytes = RsaPublicKey.from_bytes  # type: ignore[method-assign,assignment]
