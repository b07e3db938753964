"""Petals' records of servers, filled from ours."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from petals.dht import records

UID_DELIMITER = "."
CHAIN_DELIMITER = " "
CACHE_TOKENS_AVAILABLE = "cache_tokens_available"
ModuleUID: TypeAlias = str
PeerID: TypeAlias = str
RPSInfo: TypeAlias = Mapping[str, float]
DTYPE_MAP: dict[str, Any] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "auto": "auto",
}


def parse_uid(uid: ModuleUID) -> tuple[str, int]:
    """ "prefix.7" -> ("prefix", 7). Raises ValueError for a chain of several, or no number."""
    prefix, dot, index = uid.rpartition(UID_DELIMITER)
    if CHAIN_DELIMITER in uid or not dot or not index.isdecimal():
        raise ValueError(f"{uid!r} does not name one block")
    return prefix, int(index)


class QuantType(enum.Enum):
    """How a server quantises blocks; `--quant_type` takes the names in small letters."""

    NONE = 0
    INT8 = 1
    NF4 = 2


class ServerState(enum.Enum):
    """As Petals counts them."""

    OFFLINE = 0
    JOINING = 1
    ONLINE = 2


@dataclass
class ModelInfo:
    """A model that is served."""

    num_blocks: int
    repository: str | None = None


@dataclass
class ServerInfo:
    """What a server says of itself."""

    state: ServerState
    throughput: float
    start_block: int | None = None
    end_block: int | None = None
    public_name: str | None = None
    version: str | None = None
    network_rps: float | None = None
    forward_rps: float | None = None
    inference_rps: float | None = None
    adapters: tuple[str, ...] = ()
    torch_dtype: str | None = None
    quant_type: str | None = None
    using_relay: bool | None = None
    cache_tokens_left: int | None = None
    next_pings: Mapping[PeerID, float] | None = None

    @classmethod
    def of(cls, record: records.ServerRecord) -> ServerInfo:
        """From a record of this network."""
        online = record.state is records.ServerState.ONLINE
        joining = record.state is records.ServerState.JOINING
        return cls(
            state=ServerState.ONLINE if online else ServerState.JOINING if joining else ServerState.OFFLINE,
            throughput=record.inference_rps,
            start_block=record.blocks.start,
            end_block=record.blocks.stop,
            public_name=record.public_name or None,
            version=record.version,
            forward_rps=record.forward_rps,
            inference_rps=record.inference_rps,
            adapters=record.adapters,
            torch_dtype=record.dtype,
            quant_type=record.quant_type,
            using_relay=record.using_relay,
            cache_tokens_left=record.cache_tokens_left,
            next_pings={str(peer): seconds for peer, seconds in record.round_trips_s.items()},
        )


@dataclass
class RemoteModuleInfo:
    """Who holds one block."""

    uid: ModuleUID
    servers: dict[PeerID, ServerInfo] = field(default_factory=dict)
