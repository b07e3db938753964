"""Where things are in the directory."""

from __future__ import annotations

import hashlib

from petals.protocols.types import ModelId, PeerId

NAMESPACE = "petals"
"""Of values; a validator of ours is registered for it at every peer."""

RELAY_KEY = "1220" + hashlib.sha256(b"/libp2p/relay").hexdigest()
"""The content key that peers provide who relay for others (go-libp2p's name for it)."""


def swarm_key(model: ModelId) -> str:
    """The content key that servers of a model provide: a sha2-256 multihash in hex, as any libp2p DHT node takes it."""
    return "1220" + hashlib.sha256(f"/{NAMESPACE}/model/{model.digest}".encode()).hexdigest()


def record_key(model: ModelId, peer_id: PeerId) -> str:
    """Where a server's signed record is stored. Only that peer can write there: the validator checks the signer."""
    return f"/{NAMESPACE}/{model.digest}/{peer_id}"


def parse_record_key(key: str) -> tuple[str, PeerId] | None:
    """(digest, peer ID) of a record key; None if it is none."""
    parts = key.split("/")
    if len(parts) != 4 or parts[0] or parts[1] != NAMESPACE:
        return None
    return parts[2], PeerId(parts[3])
