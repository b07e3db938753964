"""What a stranger can make us hold, or parse, is bounded before it is held or parsed."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable

import pytest
import trio
from libp2p.crypto.pb import crypto_pb2
from libp2p.kad_dht.pb.kademlia_pb2 import Record
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo

from petals.dht import directory
from petals.dht.directory import open_directory
from petals.dht.keys import record_key
from petals.dht.records import RecordError, sign_record
from petals.models.errors import DocumentError
from petals.models.source.weights import MAX_VALUES, decode_index, decode_section, open_preimage
from petals.peer.base.concurrency import apart
from petals.peer.base.identity import Identity, create_identity, verify
from petals.peer.net.host import open_host
from petals.protocols.types import ModelId
from petals.protocols.weights import MAX_DOCUMENT_BYTES
from tests.fuzz.swarm import a_record
from tests.transport.conftest import LOOPBACK

BOMBS: dict[str, Callable[[], bytes]] = {
    "empty lists": lambda: b"[" + b"[]," * (MAX_DOCUMENT_BYTES // 3 - 2) + b"[]]",
    "empty objects": lambda: b"[" + b"{}," * (MAX_DOCUMENT_BYTES // 3 - 2) + b"{}]",
    "numbers": lambda: b"[" + b"1e9," * (MAX_DOCUMENT_BYTES // 4 - 2) + b"1]",
    "depth": lambda: b"[" * (MAX_DOCUMENT_BYTES - 1),
    "depth of objects": lambda: b'{"":' * (MAX_DOCUMENT_BYTES // 4 - 1),
    "keys": lambda: b"{" + b",".join(b'"%d":0' % index for index in range(1_300_000)) + b"}",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_document_is_counted_before_it_is_parsed(bomb: Callable[[], bytes]) -> None:
    """16 MiB of lists were 570 MiB in memory, and seconds of the event loop."""
    data = bomb()
    assert len(data) <= MAX_DOCUMENT_BYTES
    tracemalloc.start()
    try:
        for read in (decode_index, lambda data: decode_section(0, data)):
            began = time.process_time()
            with pytest.raises(DocumentError, match=r"values|JSON"):
                read(data)
            assert time.process_time() - began < 2
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
    finally:
        tracemalloc.stop()


def test_the_largest_index_that_is_taken() -> None:
    names = [f"model.layers.{index}.mlp.experts.0.gate_proj.weight" for index in range(MAX_VALUES // 4)]
    assert len(decode_index(json.dumps({"licence": "", "names": names}).encode()).names) == len(names)
    with pytest.raises(DocumentError):
        open_preimage("ab" * 32, b"{}")


async def test_strangers_words_are_read_one_at_a_time_and_beside_the_loop() -> None:
    at_once, most = 0, 0

    def read() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.01)
        at_once -= 1

    turns = 0
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(apart, read)
        while at_once or not most:
            turns += 1
            await trio.sleep(0.001)
    assert most == 1
    assert turns > 5, "the loop stood still"


async def test_the_directory_holds_so_many_bytes_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """By many writers, fat ones and lean ones: the fattest lose their oldest values first."""
    monkeypatch.setattr(directory, "MAX_VALUES_BYTES", 64 << 10)
    monkeypatch.setattr(directory, "MAX_WRITER_BYTES", 16 << 10)
    me = create_identity()
    async with open_host(me.key_pair, LOOPBACK) as host, open_directory(host, me, verify) as node:
        values = node._dht.value_store

        def store(writer: Identity, number: int, text: str = "") -> bytes:
            adapters = (text,) * 60 if text else ()
            record = a_record(model=ModelId("m", f"{number:064x}"), peer_id=writer.peer_id, adapters=adapters)
            key = record_key(record.model, writer.peer_id).encode()
            data = sign_record(record, writer.sign, writer.public_key)
            values.put_record(key, Record(key=key, value=data))
            return key

        lean, *fat = (create_identity() for _ in range(12))
        kept = store(lean, 0)
        for writer in fat:
            for number in range(8):
                store(writer, number, "x" * 50)
        held = sum(len(key) + record.ByteSize() for key, (record, _) in values.store.items())
        assert 32 << 10 < held <= 64 << 10
        assert held == values._bytes == sum(size for _, size in values._held.values())
        assert kept in values.store, "a small writer lost its value to large ones"
        for key in list(values.store):
            values.remove(key)
        assert not values._bytes
        assert not values._keys_of
        assert not values._bytes_of


async def test_a_fat_public_key_and_too_many_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_PROVIDER_RECORDS", 100)
    me = create_identity()
    async with open_host(me.key_pair, LOOPBACK) as host, open_directory(host, me, verify) as node:
        peer = ID.from_base58(me.peer_id)
        padded = crypto_pb2.PublicKey.FromString(me.public_key).SerializeToString() + b"\x7a\x80\x10" + bytes(2048)
        with pytest.raises(RecordError):
            node._dht.validator.validate("/pk/" + peer.to_bytes().hex(), padded)
        for number in range(300):
            other = ID.from_base58(create_identity().peer_id) if number < 100 else peer
            node._dht.provider_store.add_provider(f"{number:032}".encode(), PeerInfo(other, []))
        assert sum(len(entries) for entries in node._dht.provider_store.providers.values()) <= 100
