"""`petals.client.routing` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "RemoteSequenceManager": "petals.peer.client.sequence_manager",
        "SequenceManagerConfig": "petals:ClientConfig",
        "NoSpendingPolicy": "petals.compat.spending",
        "SpendingPolicyBase": "petals.compat.spending",
        "MissingBlocksError": "petals.protocols.errors:MissingBlocks",
    },
)
