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
    "RemoteSequential": "petals.models.remote_sequential",
    "InferenceSession": "petals.models.generation",
    "LoraSettings": "petals.models.tuning",
    "ClientConfig": "petals.peer.pretrained",
}
_PRETRAINED = ("AutoDistributed", "Distributed")
"""What the classes with `from_pretrained` begin with, one for each head and family."""


def __getattr__(name: str) -> Any:
    home = "petals.peer.pretrained" if name.startswith(_PRETRAINED) else _HOMES.get(name)
    try:
        if home is not None:
            return getattr(importlib.import_module(home), name)
    except AttributeError:
        pass
    raise AttributeError(f"module 'petals' has no attribute {name!r}")
