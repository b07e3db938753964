"""Names that every room uses for the same thing.

Block ranges are builtin `range` objects with step 1: half-open, ordered, hashable, `len()` and `in` included.
"""

from __future__ import annotations

from typing import NamedTuple, NewType

PeerId = NewType("PeerId", str)
"""A libp2p peer ID in its base58 text form ("12D3Koo...", "Qm..."). libp2p's own `ID` objects stay inside the seam."""

MAX_PEER_ID_BYTES = 64
"""In binary. The longest in use, a key of 42 bytes itself, has 44. To write one as text takes the square of its length:
one of 128 KiB would stop a node for half a minute."""

SessionId = NewType("SessionId", bytes)
"""16 random bytes chosen by the client; names one inference session at one server."""


class ModelId(NamedTuple):
    """Which model is meant. Two checkpoints of the same name differ in `digest`, so their swarms never mix."""

    name: str
    """For people: hub name or directory name, at most 200 characters."""
    digest: str
    """64 hex digits over configuration and block weights' identity (models/source/checkpoint.py says how)."""
