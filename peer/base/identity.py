"""Who a peer is: a key pair, and the peer ID that is the hash of its public half.

Key files hold libp2p's protobuf encoding of a private key, like those of go-libp2p and of the original Petals; Ed25519
(new keys) and RSA are accepted. The key never appears in a repr, a log or an error.
"""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

import multihash  # type: ignore[import-untyped]
from libp2p.crypto.ed25519 import create_new_key_pair as new_ed25519
from libp2p.crypto.keys import KeyPair, KeyType
from libp2p.crypto.rsa import create_new_key_pair as new_rsa
from libp2p.crypto.serialization import deserialize_private_key
from libp2p.peer.id import ID

from petals.peer.base.public_key import parse_public_key
from petals.protocols.errors import UserError
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

MAX_KEY_FILE_BYTES = 16 << 10

PUBLIC_TEST_PEERS = frozenset(
    {
        "12D3KooWHtURmmUjrRwSiMY8FcjtDevyhTTAQAMRfBKuz8ErYeAT",
        "12D3KooWGzSHQPPxjusisvamogcpS2rd8ZjKFaqe8wx1Nr1cq75b",
        "12D3KooWE7HQuwNrCz3ABBfCEney6JnGSC6xv9hDYott3HkUGetr",
        "12D3KooWCB4YgMPPC2tcvoFB2D3DxYxPENwBC9hBzxDsLTcGRCwv",
    }
)
"""Of the keys in identities/, which everybody has: there is nothing to hide in their files."""


class IdentityError(UserError):
    """A key file that can not be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Identity:
    """A peer's key pair and name."""

    key_pair: KeyPair = field(repr=False)
    peer_id: PeerId

    @property
    def private_key(self) -> bytes:
        """The secret half, as key files hold it."""
        return self.key_pair.private_key.serialize()

    @property
    def public_key(self) -> bytes:
        """The public half in libp2p's protobuf form, as signed records carry it."""
        return self.key_pair.public_key.serialize()

    def sign(self, data: bytes) -> bytes:
        """A signature over `data` that `verify` accepts for this peer."""
        return self.key_pair.private_key.sign(data)


def load_identity(path: Path) -> Identity:
    """Read a key file.

    Raises:
        IdentityError: it can not be read, or holds no Ed25519 or RSA private key.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise IdentityError(f"can not read the key file {path}: {error.strerror}") from None
    try:
        private = deserialize_private_key(data)
        if len(data) > MAX_KEY_FILE_BYTES or private.get_type() not in (KeyType.Ed25519, KeyType.RSA):
            raise ValueError
        identity = _identity(KeyPair(private, private.get_public_key()))
        parse_public_key(identity.public_key)  # else nobody would accept us
    except Exception:  # the library raises whatever its parsers raise, and its messages may quote the key
        raise IdentityError(
            f"{path} holds no Ed25519 or RSA private key in libp2p's encoding (RSA: 2,048 to 4,096 bits, e = 65537); "
            "make one with: petals keygen FILE"
        ) from None
    if identity.peer_id not in PUBLIC_TEST_PEERS:
        warn_if_shared(path)
    return identity


def create_identity(path: Path | None = None, key_type: str = "ed25519") -> Identity:
    """A new identity, written to `path` (mode 0600, never overwriting) unless that is None.

    Raises:
        IdentityError: the file exists or can not be written.
    """
    if key_type not in ("ed25519", "rsa"):
        raise IdentityError(f"unknown key type {key_type!r}: choose ed25519 or rsa")
    key_pair = new_rsa(2048) if key_type == "rsa" else new_ed25519()
    if path is not None:
        write_private(path, key_pair.private_key.serialize())
    return _identity(key_pair)


def write_private(path: Path, data: bytes) -> None:
    """A new file for its owner's eyes only (mode 0600): whole or not at all, and never over another one.

    Raises:
        IdentityError: the file exists or can not be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
            os.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        if path.exists():
            raise IdentityError(f"{path} exists already and is not overwritten; choose another name") from None
        raise IdentityError(f"can not write the key file {path}: {error.strerror}") from None


_warned: set[Path] = set()


def warn_if_shared(path: Path) -> None:
    """Say so, once for each file, when a file with a secret can be read or changed by others on this machine."""
    if os.name == "posix" and path.stat().st_mode & 0o077 and path not in _warned:
        _warned.add(path)
        log.warning("%s can be read or changed by others on this machine: chmod 600 %s", path, path)


def load_or_create_identity(path: Path) -> Identity:
    """The identity in `path`, made on first use; of two processes that start at once both get the same one."""
    try:
        return load_identity(path) if path.exists() else create_identity(path)
    except IdentityError:
        if not path.exists():
            raise
        return load_identity(path)


def parse_peer_id(text: str) -> PeerId:
    """The peer ID that a user has written.

    Raises:
        UserError: it is none.
    """
    try:
        peer_id = ID.from_base58(text)
        multihash.decode(peer_id.to_bytes())
    except Exception:  # base58 and multihash raise half a dozen unrelated kinds
        raise UserError(f"{text[:80]!r} is no peer ID; `petals keygen` prints them, like 12D3KooW...") from None
    return PeerId(str(peer_id))


def decode_identity(private_key: bytes) -> Identity:
    """The identity of a private key in libp2p's protobuf form.

    Raises:
        IdentityError: it is none. The message quotes nothing of it.
    """
    try:
        private = deserialize_private_key(private_key)
        return _identity(KeyPair(private, private.get_public_key()))
    except Exception:  # as in `load_identity`
        raise IdentityError("no private key in libp2p's encoding") from None


def signer_of(public_key: bytes, data: bytes, signature: bytes) -> PeerId | None:
    """Whose `signature` over `data` this is; None: not the one of that key, or no key of bounded cost."""
    try:
        key = parse_public_key(public_key)
        return PeerId(ID.from_pubkey(key).to_base58()) if key.verify(data, signature) else None
    except Exception:  # as in `verify`
        return None


def verify(peer_id: PeerId, public_key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether `signature` over `data` was made by the peer of that name, whose public key is claimed to be this."""
    try:
        key = parse_public_key(public_key)
        return ID.from_pubkey(key).to_base58() == peer_id and key.verify(data, signature)
    except Exception:  # garbage makes the library's parsers raise anything; all of it means no
        return False


def _identity(key_pair: KeyPair) -> Identity:
    return Identity(key_pair, PeerId(ID.from_pubkey(key_pair.public_key).to_base58()))
