"""Petals on libp2p: run and fine-tune language models together, each peer holding some of the blocks."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Names are looked up when first used: `petals --help` and `run_dht` must start without importing torch.
_HOMES: dict[str, str] = {
    "open_peer": "petals.peer.node",
    "Peer": "petals.peer.node",
    "PeerConfig": "petals.peer.config",
    "ServeConfig": "petals.peer.config",
    "Timeouts": "petals.peer.config",
    "connect": "petals.peer.sync",
    "SyncPeer": "petals.peer.sync",
    "GenerationOptions": "petals.peer.client.generation",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'petals' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
