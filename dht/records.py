"""What a server says about itself, signed by it: encode, decode, and every check before a word of it is believed.

Growth: fields are added to records.proto under new numbers; a reader ignores what it does not know, and the signature
covers the bytes as they came, so that an old reader can pass a new record on. A field never changes its meaning.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from petals.dht import records_pb2 as pb
from petals.protocols.errors import SwarmError
from petals.protocols.types import ModelId, PeerId

DOMAIN = b"petals/server-record/1\n"
"""Signed in front of the record, so that no signature for another purpose can be passed off as one."""

MAX_RECORD_BYTES = 16 << 10
MAX_ADDRS = 16
MAX_ADAPTERS = 64
MAX_ROUND_TRIPS = 64
MAX_TEXT = 200
MAX_INSTANCE_BYTES = 16
MAX_LIFETIME_S = 3600.0
MAX_CLOCK_SKEW_S = 60.0
"""How far another peer's clock may be ahead of ours."""

Verify = Callable[[PeerId, bytes, bytes, bytes], bool]
"""(peer ID, public key, data, signature) -> whether that peer signed it."""


class RecordError(SwarmError):
    """A record that is not believed.

    Attributes:
        reason: in one word, to count by: malformed, signature, time, peer or digest.
        ahead_s: of "time": the record's date minus ours, in seconds.
    """

    def __init__(self, message: str, reason: str = "malformed", ahead_s: float | None = None) -> None:
        self.reason = reason
        self.ahead_s = ahead_s
        super().__init__(message)


class ServerState(enum.IntEnum):
    JOINING = 1
    """Loading; streams are not answered yet."""
    ONLINE = 2
    """Streams are answered."""
    DRAINING = 3
    """Open sessions are finished, new ones are refused."""
    OFFLINE = 4
    """Gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRecord:
    """One server's word about one model. Limits are checked by `open_record`."""

    model: ModelId
    peer_id: PeerId
    blocks: range
    """Which blocks it holds; half-open, at most 4,096."""
    state: ServerState
    num_blocks: int = 0
    """Of the whole model, at most 4,096; 0: not said."""
    addrs: tuple[str, ...] = ()
    """Full multiaddrs; at most 16 of at most 200 characters."""
    version: str = ""
    public_name: str = ""
    dtype: str = "float32"
    """What it computes in: float32, bfloat16 or float16."""
    quant_type: str = "none"
    adapters: tuple[str, ...] = ()
    """Names of hosted LoRA adapters; at most 64."""
    inference_rps: float = 0.0
    """Blocks passed per second by one token of one sequence, as measured by the server."""
    forward_rps: float = 0.0
    """Blocks passed per second and token in a long sequence, as measured by the server."""
    queue_s: float = 0.0
    """How long a step waits for the compute thread, smoothed; seconds."""
    cache_tokens_left: int = 0
    """Tokens (of one row, over all its blocks) it has cache room for."""
    using_relay: bool = False
    reachability: str = ""
    """How others reach it (peer/membership/reachability.py)."""
    round_trips_s: Mapping[PeerId, float] = field(default_factory=dict)
    """Round trips to other peers, in seconds; at most 64."""
    instance: bytes = b""
    """Random, one per process; at most 16 bytes. Two at a time under one key are two processes (troubles.py)."""
    key_elsewhere: bool = False
    """Whether the server has seen another process announce with its key."""
    sequence: int
    """Counts up; of two records of a peer and model the higher one holds."""
    issued_at: float
    """Unix seconds by the server's clock; at most a minute ahead of the reader's."""
    expires_at: float
    """Unix seconds; at most an hour after `issued_at`. The record is nothing afterwards."""

    def as_json(self) -> dict[str, Any]:
        """What people who look at the swarm are shown of it, for machines."""
        return {
            "peer_id": self.peer_id,
            "name": self.public_name,
            "state": self.state.name.lower(),
            "blocks": [self.blocks.start, self.blocks.stop],
            "version": self.version,
            "dtype": self.dtype,
            "quant_type": self.quant_type,
            "adapters": list(self.adapters),
            "decode_blocks_per_s": self.inference_rps,
            "prefill_blocks_per_s": self.forward_rps,
            "queue_s": self.queue_s,
            "cache_tokens_left": self.cache_tokens_left,
            "round_trips_s": {str(peer): seconds for peer, seconds in self.round_trips_s.items()},
            "relayed": self.using_relay,
            "reachability": self.reachability,
            "key_elsewhere": self.key_elsewhere,
        }


def sign_record(record: ServerRecord, sign: Callable[[bytes], bytes], public_key: bytes) -> bytes:
    """The record as it travels and is stored."""
    payload = pb.ServerRecord(
        model_name=record.model.name,
        model_digest=record.model.digest,
        peer_id=record.peer_id,
        start_block=record.blocks.start,
        end_block=record.blocks.stop,
        state=int(record.state),
        addrs=record.addrs[:MAX_ADDRS],
        version=record.version,
        public_name=record.public_name,
        dtype=record.dtype,
        quant_type=record.quant_type,
        adapters=record.adapters,
        inference_rps=record.inference_rps,
        forward_rps=record.forward_rps,
        queue_s=record.queue_s,
        cache_tokens_left=record.cache_tokens_left,
        using_relay=record.using_relay,
        reachability=record.reachability,
        round_trips_s={str(peer): seconds for peer, seconds in record.round_trips_s.items()},
        sequence=record.sequence,
        issued_at=record.issued_at,
        expires_at=record.expires_at,
        num_blocks=record.num_blocks,
        instance=record.instance,
        key_elsewhere=record.key_elsewhere,
    ).SerializeToString()
    return pb.SignedRecord(public_key=public_key, record=payload, signature=sign(DOMAIN + payload)).SerializeToString()


def open_record(data: bytes, *, now: float, verify: Verify, expected_model: ModelId | None = None) -> ServerRecord:
    """The record in `data`, after every check.

    Args:
        now: Unix seconds.
        expected_model: whose digest the record must name.
    Raises:
        RecordError: too large, garbage, not signed by the peer it names, expired, dated in the future, about another
            model, or a field out of its limits.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise RecordError(f"record of {len(data)} bytes, at most {MAX_RECORD_BYTES}")
    try:
        envelope = pb.SignedRecord.FromString(data)
        fields = pb.ServerRecord.FromString(envelope.record)
    except DecodeError:
        raise RecordError("a record that does not decode") from None
    peer_id = PeerId(fields.peer_id)
    _check(len(peer_id) <= MAX_TEXT, "peer ID too long")
    signed = verify(peer_id, envelope.public_key, DOMAIN + envelope.record, envelope.signature)
    _check(signed, "not signed by the peer it names", "signature")
    _check_time(fields, now)
    _check_limits(fields)
    if expected_model is not None and fields.model_digest != expected_model.digest:
        raise RecordError("a record of another model", "digest")
    return ServerRecord(
        model=ModelId(fields.model_name, fields.model_digest),
        peer_id=peer_id,
        blocks=range(fields.start_block, fields.end_block),
        state=ServerState(fields.state),
        addrs=tuple(fields.addrs),
        version=fields.version,
        public_name=fields.public_name,
        dtype=fields.dtype,
        quant_type=fields.quant_type,
        adapters=tuple(fields.adapters),
        inference_rps=fields.inference_rps,
        forward_rps=fields.forward_rps,
        queue_s=fields.queue_s,
        cache_tokens_left=fields.cache_tokens_left,
        using_relay=fields.using_relay,
        reachability=fields.reachability,
        round_trips_s={PeerId(peer): seconds for peer, seconds in fields.round_trips_s.items()},
        sequence=fields.sequence,
        issued_at=fields.issued_at,
        expires_at=fields.expires_at,
        num_blocks=fields.num_blocks,
        instance=fields.instance,
        key_elsewhere=fields.key_elsewhere,
    )


class Peek(NamedTuple):
    """What a holder needs of a record that it has checked before."""

    peer_id: PeerId
    sequence: int
    expires_at: float


def peek(data: bytes) -> Peek:
    """Author, sequence number and expiry of a record, nothing verified.

    Raises:
        RecordError: garbage.
    """
    try:
        fields = pb.ServerRecord.FromString(pb.SignedRecord.FromString(data).record)
    except DecodeError:
        raise RecordError("a record that does not decode") from None
    return Peek(PeerId(fields.peer_id), fields.sequence, fields.expires_at)


def dated(data: bytes) -> float:
    """When the record in `data` was issued, Unix seconds by its author's clock; unchecked: for comparing clocks.

    Raises:
        RecordError: garbage.
    """
    try:
        return float(pb.ServerRecord.FromString(pb.SignedRecord.FromString(data).record).issued_at)
    except DecodeError:
        raise RecordError("a record that does not decode") from None


def _check_time(fields: pb.ServerRecord, now: float) -> None:
    _check(math.isfinite(fields.issued_at) and math.isfinite(fields.expires_at), "time that is no number", "time")
    ahead_s = fields.issued_at - now
    if ahead_s > MAX_CLOCK_SKEW_S:
        raise RecordError(f"server record: dated {ahead_s:.0f} s in the future", "time", ahead_s)
    _check(fields.expires_at <= fields.issued_at + MAX_LIFETIME_S, "lives too long", "time")
    if now >= fields.expires_at:
        raise RecordError("server record: expired", "time", ahead_s)


def _check_limits(fields: pb.ServerRecord) -> None:
    _check(len(fields.model_name) <= MAX_TEXT, "model name too long")
    _check(len(fields.model_digest) == 64 and set(fields.model_digest) <= set("0123456789abcdef"), "bad digest")
    _check(fields.start_block < fields.end_block <= 4096, "bad block range")
    _check(not fields.num_blocks or fields.end_block <= fields.num_blocks <= 4096, "bad number of blocks")
    _check(fields.state in set(ServerState), "unknown state")
    _check(len(fields.addrs) <= MAX_ADDRS and len(fields.adapters) <= MAX_ADAPTERS, "too many addresses or adapters")
    texts = (
        *fields.addrs,
        *fields.adapters,
        fields.version,
        fields.public_name,
        fields.dtype,
        fields.quant_type,
        fields.reachability,
    )
    _check(all(len(text) <= MAX_TEXT for text in texts), "text too long")
    _check(len(fields.instance) <= MAX_INSTANCE_BYTES, "instance too long")
    _check(len(fields.round_trips_s) <= MAX_ROUND_TRIPS, "too many round trips")
    numbers = (fields.inference_rps, fields.forward_rps, fields.queue_s, *fields.round_trips_s.values())
    _check(all(math.isfinite(number) and number >= 0 for number in numbers), "a measure that is no measure")


def _check(holds: bool, otherwise: str, reason: str = "malformed") -> None:
    if not holds:
        raise RecordError(f"server record: {otherwise}", reason)
