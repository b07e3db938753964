"""`petals.client.routing.sequence_manager` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "RemoteSequenceManager": "petals.peer.client.sequence_manager",
        "SequenceManagerConfig": "petals:ClientConfig",
        "MissingBlocksError": "petals.protocols.errors:MissingBlocks",
    },
)
