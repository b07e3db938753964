"""Where things are in the directory."""

from __future__ import annotations

import base64
import hashlib

from petals.protocols.types import ModelId, PeerId

NAMESPACE = "petals"
"""Of values; a validator of ours is registered for it at every peer."""

RECORD_KEY_BYTES = 24
"""Of a SHA-256: as long as nobody can find two peers of one key, and 32 characters without padding."""

RELAY_KEY = "1220" + hashlib.sha256(b"/libp2p/relay").hexdigest()
"""The content key that peers provide who relay for others (go-libp2p's name for it)."""


def swarm_key(model: ModelId) -> str:
    """The content key that servers of a model provide: a sha2-256 multihash in hex, as any libp2p DHT node takes it."""
    return "1220" + hashlib.sha256(f"/{NAMESPACE}/model/{model.digest}".encode()).hexdigest()


def record_key(model: ModelId, peer_id: PeerId) -> str:
    """Where a server's signed record is stored. Only that peer can write there: the validator makes the key again from
    what was signed. It is a hash, to be short: py-libp2p (0.8.1) answers no FIND_NODE for a key of more than 50 bytes,
    and other implementations ask that before they store anything."""
    named = hashlib.sha256(f"/{NAMESPACE}/record/{model.digest}/{peer_id}".encode()).digest()
    return f"/{NAMESPACE}/{base64.urlsafe_b64encode(named[:RECORD_KEY_BYTES]).decode()}"


def is_record_key(key: bytes) -> bool:
    """Whether a value under this key can only be a server's record."""
    return key.startswith(f"/{NAMESPACE}/".encode())
