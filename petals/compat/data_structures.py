"""`petals.data_structures` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import Gone, moved

__getattr__, __dir__ = moved(
    __name__,
    dict.fromkeys(
        (
            "UID_DELIMITER",
            "CHAIN_DELIMITER",
            "ModuleUID",
            "PeerID",
            "parse_uid",
            "ModelInfo",
            "ServerState",
            "ServerInfo",
            "RemoteModuleInfo",
            "RPSInfo",
        ),
        "petals.compat.data",
    )
    | {
        "RemoteSpanInfo": "petals.peer.client.sequence_manager",
        "InferenceMetadata": Gone("what a request carries is in petals.protocols.inference"),
    },
)
