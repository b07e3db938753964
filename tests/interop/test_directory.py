"""js-libp2p and go-libp2p nodes as part of our directory: they keep what we store, and find what we keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message

from petals.dht.keys import record_key, swarm_key
from petals.dht.records import open_record, sign_record
from petals.peer.base.identity import create_identity, verify
from petals.protocols.types import PeerId
from tests.dht.conftest import MODEL, Net, make_record
from tests.dht.conftest import net as net  # a fixture
from tests.interop.foreign import go_peer, js_peer

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]


async def test_js_finds_what_we_keep_and_keeps_what_we_find(net: Net) -> None:
    server = await net.add(direct=False)
    reader = await net.add(direct=False)
    record = await server.announce()
    dial: Any
    with trio.fail_after(120):
        async with js_peer(kademlia="yes") as (addr, dial):
            mine = server.host.addrs[0]
            assert server.peer_id in await dial("find", mine, swarm_key(MODEL))
            value = bytes.fromhex(await dial("get", mine, record_key(MODEL, server.peer_id)))
            now = record.issued_at
            assert open_record(value, now=now, verify=verify, expected_model=MODEL) == record
            assert await dial("provide", mine, swarm_key(MODEL)) is True
            named = addr.rpartition("/p2p/")[2]
            assert named in await server.directory.find_providers(swarm_key(MODEL))
            record = await server.announce()  # js is one of the nodes nearest to everything
            request = Message(type=Message.MessageType.GET_VALUE, key=record_key(MODEL, server.peer_id).encode())
            await reader.host.connect(addr)
            kept = await reader.directory._ask(PeerId(named), request)
            assert kept is not None
            assert open_record(kept.record.value, now=now, verify=verify, expected_model=MODEL) == record


async def test_js_stores_records_for_others_and_forged_ones_for_nobody(net: Net) -> None:
    node, other = await net.add(direct=False), await net.add(direct=False)
    author, liar = create_identity(), create_identity()
    key = record_key(MODEL, author.peer_id)
    record = make_record(author.peer_id)
    value = sign_record(record, author.sign, author.public_key)
    forged = sign_record(replace(record, sequence=record.sequence + 1), liar.sign, liar.public_key)
    dial: Any
    with trio.fail_after(120):
        async with js_peer(kademlia="yes") as (_, dial):
            told = await dial("put", node.host.addrs[0], {"key": key, "value": value.hex()})
            keepers = [each for each in (node, other) if each.peer_id in told]
            assert keepers, "js tells those that it has met by now: one of the two, or both"
            await dial("put", node.host.addrs[0], {"key": key, "value": forged.hex()})
            for each in keepers:
                assert each.directory._dht.value_store.get(key.encode()).value == value
            assert sum(each.directory.dropped_records["signature"] for each in (node, other)) > 0


async def test_go_finds_whom_we_list_and_we_whom_it_lists(net: Net, tmp_path: Path) -> None:
    server = await net.add(direct=False)
    reader = await net.add(direct=False)
    await server.announce()
    with trio.fail_after(120):
        async with go_peer(tmp_path, "-relay=false", "-dht") as (addr, go):
            await go.connect(server.host.addrs[0])
            while server.peer_id not in await go.providers(swarm_key(MODEL)):  # noqa: ASYNC110 - another process
                await trio.sleep(0.05)  # it has not yet been told that we speak Kademlia
            await go.provide(swarm_key(MODEL))
            named = addr.rpartition("/p2p/")[2]
            while named not in await reader.directory.find_providers(swarm_key(MODEL)):  # noqa: ASYNC110 - the same
                await trio.sleep(0.05)  # go does not wait for those whom it tells
