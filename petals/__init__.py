"""Petals on libp2p: run and fine-tune language models together, each peer holding some of the blocks."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

__version__ = "0.1.0"

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    # Threads that wait for each other spin, and libgomp, which torch brings, lets them do so for milliseconds: all the
    # while a server's thread takes the core from which its neighbour, or the client, should answer. A tenth of a
    # millisecond bridges the gap to the next product. Measured on two cores (torch 2.13): alone 3 % slower, a token
    # through two servers 10 % sooner, loading on a busy machine 9 s instead of 46.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# Names are looked up when first used: `petals --help` and `run_dht` must start without importing torch.
_HOMES: dict[str, str] = {
    "open_peer": "petals.peer.node",
    "Peer": "petals.peer.node",
    "PeerConfig": "petals.peer.base.config",
    "ServeConfig": "petals.peer.base.config",
    "Timeouts": "petals.peer.base.config",
    "connect": "petals.peer.sync",
    "SyncPeer": "petals.peer.sync",
    "GenerationOptions": "petals.peer.client.generation.generation",
    "RemoteSequential": "petals.peer.pretrained",
    "InferenceSession": "petals.models.client.generation",
    "LoraSettings": "petals.models.client.tuning",
    "ClientConfig": "petals.peer.client_config",
}
__path__.append(os.path.join(os.path.dirname(__file__), "compat"))
"""Petals' own module paths (`petals.client`, `petals.utils`, ...) lead to thin modules in that folder."""
_PRETRAINED = ("AutoDistributed", "Distributed")
"""What the classes with `from_pretrained` begin with, one for each head and family."""


def __getattr__(name: str) -> Any:
    home = "petals.peer.pretrained" if name.startswith(_PRETRAINED) else _HOMES.get(name)
    try:
        if home is not None:
            return getattr(importlib.import_module(home), name)
    except AttributeError:
        pass
    if not name.startswith("_"):
        from petals.compat.top_level import __getattr__ as moved

        return moved(name)
    raise AttributeError(f"module 'petals' has no attribute {name!r}")
