"""Server records: what is said arrives, and nothing else is believed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.dht import records_pb2 as pb
from petals.dht.records import (
    DOMAIN,
    MAX_CLOCK_SKEW_S,
    MAX_LIFETIME_S,
    MAX_RECORD_BYTES,
    RecordError,
    ServerRecord,
    ServerState,
    open_record,
    peek,
    sign_record,
)
from petals.peer.base.identity import create_identity, verify
from petals.protocols.types import ModelId, PeerId

NOW = 1.8e9
ME, OTHER = create_identity(), create_identity()
MODEL = ModelId("tiny", "ab" * 32)

text = st.text(max_size=60)
measures = st.floats(0, 1e6)


def record(**changes: Any) -> ServerRecord:
    fields: dict[str, Any] = {
        "model": MODEL,
        "peer_id": ME.peer_id,
        "blocks": range(4),
        "state": ServerState.ONLINE,
        "sequence": 7,
        "issued_at": NOW,
        "expires_at": NOW + 90,
    }
    return ServerRecord(**(fields | changes))


def signed(record: ServerRecord) -> bytes:
    return sign_record(record, ME.sign, ME.public_key)


def opened(data: bytes, **arguments: Any) -> ServerRecord:
    return open_record(data, **({"now": NOW, "verify": verify} | arguments))


@st.composite
def records(draw: st.DrawFn) -> ServerRecord:
    start = draw(st.integers(0, 4000))
    return record(
        model=ModelId(draw(text), draw(st.text("0123456789abcdef", min_size=64, max_size=64))),
        blocks=range(start, draw(st.integers(start + 1, 4096))),
        state=draw(st.sampled_from(ServerState)),
        addrs=tuple(draw(st.lists(text, max_size=16))),
        version=draw(text),
        public_name=draw(text),
        dtype=draw(text),
        quant_type=draw(text),
        adapters=tuple(draw(st.lists(text, max_size=8))),
        inference_rps=draw(measures),
        forward_rps=draw(measures),
        queue_s=draw(measures),
        cache_tokens_left=draw(st.integers(0, 2**63)),
        using_relay=draw(st.booleans()),
        round_trips_s=draw(st.dictionaries(text.map(PeerId), measures, max_size=16)),
        sequence=draw(st.integers(0, 2**64 - 1)),
    )


@given(records())
def test_what_is_said_arrives(said: ServerRecord) -> None:
    data = signed(said)
    assert opened(data, expected_model=said.model) == said
    assert peek(data) == (said.peer_id, said.sequence, said.expires_at)


@given(st.data())
def test_a_changed_byte_is_noticed(data: st.DataObject) -> None:
    original = bytearray(signed(record(addrs=("/ip4/127.0.0.1/tcp/1",), round_trips_s={OTHER.peer_id: 0.1})))
    place = data.draw(st.integers(0, len(original) - 1))
    original[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RecordError):
        opened(bytes(original))


@given(st.binary(max_size=400))
def test_garbage_is_nothing_but_a_record_error(garbage: bytes) -> None:
    with pytest.raises(RecordError):
        opened(garbage)
    envelope = pb.SignedRecord(
        public_key=ME.public_key, record=garbage, signature=ME.sign(DOMAIN + garbage)
    ).SerializeToString()
    with pytest.raises(RecordError):  # rightly signed garbage too
        opened(envelope)


@given(st.data())
def test_signed_mutations_are_records_or_record_errors(data: st.DataObject) -> None:
    """A peer may sign anything: whatever passes must keep the limits."""
    fields = pb.ServerRecord.FromString(pb.SignedRecord.FromString(signed(record())).record)
    wild = st.floats(width=64)
    fields.start_block, fields.end_block = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(0, 2**32 - 1))
    fields.state = data.draw(st.integers(0, 2**32 - 1) | st.sampled_from([1, 2, 3, 4]))
    fields.issued_at, fields.expires_at = NOW + data.draw(wild), NOW + data.draw(wild)
    fields.inference_rps, fields.queue_s = data.draw(wild), data.draw(wild)
    fields.addrs.extend(data.draw(st.lists(st.text(), max_size=20)))
    payload = fields.SerializeToString()
    envelope = pb.SignedRecord(public_key=ME.public_key, record=payload, signature=ME.sign(DOMAIN + payload))
    try:
        believed = opened(envelope.SerializeToString())
    except RecordError:
        return
    assert 0 < len(believed.blocks) <= 4096
    assert believed.issued_at <= NOW + MAX_CLOCK_SKEW_S
    assert NOW < believed.expires_at <= believed.issued_at + MAX_LIFETIME_S
    assert math.isfinite(believed.inference_rps)
    assert believed.inference_rps >= 0
    assert len(believed.addrs) <= 16


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peer_id": OTHER.peer_id}, "not signed"),
        ({"issued_at": NOW + 61, "expires_at": NOW + 90}, "future"),
        ({"issued_at": NOW - 90, "expires_at": NOW}, "expired"),
        ({"expires_at": NOW + 3601}, "too long"),
        ({"expires_at": math.inf}, "no number"),
        ({"model": ModelId("tiny", "AB" * 32)}, "digest"),
        ({"model": ModelId("n" * 201, "ab" * 32)}, "name"),
        ({"blocks": range(4, 4)}, "block range"),
        ({"blocks": range(4097)}, "block range"),
        ({"addrs": ("x" * 201,)}, "text"),
        ({"adapters": tuple("abcdefgh" * 9)}, "too many"),
        ({"queue_s": -1.0}, "measure"),
        ({"inference_rps": math.nan}, "measure"),
        ({"round_trips_s": {PeerId(str(n)): 0.1 for n in range(65)}}, "round trips"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        opened(signed(record(**changes)))


def test_another_model_and_too_large() -> None:
    with pytest.raises(RecordError, match="another model"):
        opened(signed(record()), expected_model=ModelId("tiny", "cd" * 32))
    with pytest.raises(RecordError, match="bytes"):
        opened(b"\0" * (MAX_RECORD_BYTES + 1))


def test_a_signature_for_another_purpose_is_none() -> None:
    payload = pb.SignedRecord.FromString(signed(record())).record
    envelope = pb.SignedRecord(public_key=ME.public_key, record=payload, signature=ME.sign(payload))
    with pytest.raises(RecordError):
        opened(envelope.SerializeToString())


def test_a_newer_peer_may_say_more() -> None:
    payload = pb.SignedRecord.FromString(signed(record())).record + b"\xf2\x07\x03new"  # field 126, bytes
    envelope = pb.SignedRecord(public_key=ME.public_key, record=payload, signature=ME.sign(DOMAIN + payload))
    assert opened(envelope.SerializeToString()) == record()


def test_an_old_record_still_decodes() -> None:
    """Frozen on 2026-11-23: signed by identities/local-1.key. If this fails, the wire format has changed."""
    data = bytes.fromhex(OLD_RECORD)
    old = open_record(data, now=NOW, verify=verify)
    assert (old.peer_id, old.blocks, old.dtype) == (
        "12D3KooWHtURmmUjrRwSiMY8FcjtDevyhTTAQAMRfBKuz8ErYeAT",
        range(4, 8),
        "bfloat16",
    )
    assert old.round_trips_s == {"12D3KooWGzSHQPPxjusisvamogcpS2rd8ZjKFaqe8wx1Nr1cq75b": 0.25}


OLD_RECORD = (
    "0a240801122077eae555e758e60407272d736e88ea827f7f2f0ea9085beae4b4cad7bc306ea01290020a0474696e79124061"
    "6261626162616261626162616261626162616261626162616261626162616261626162616261626162616261626162616261"
    "626162616261626162616261621a34313244334b6f6f57487455526d6d556a72527753694d593846636a7444657679685454"
    "4151414d5266424b757a384572596541542004280830023a182f6970342f3132372e302e302e312f7463702f333133333752"
    "0862666c6f617431365a046e6f6e6569000000000000294092013f0a34313244334b6f6f57477a5348515050786a75736973"
    "76616d6f67637053327264385a6a4b46617165387778314e7231637137356211000000000000d03f980109a1010000008074"
    "d2da41a9010000809674d2da411a401d72bdf1fe2b0e17c1ce3d8a8daf07d31d81954d1d90497ff42ae44e23518c67015dd5"
    "9e7140b55fc8f3ee9fe3417d293b9c2276c25f5e872cc151ecc6068c00"
)
