"""js-libp2p and go-libp2p nodes as part of our directory: they keep what we store, and find what we keep.

It can not store under our keys: py-libp2p 0.8.1 answers no FIND_NODE for a key of more than 50 bytes, which js asks
first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID

from petals.dht.keys import record_key, swarm_key
from petals.dht.records import open_record
from petals.peer.identity import verify
from petals.protocols.types import PeerId
from tests.dht.conftest import MODEL, Net
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


async def test_go_finds_whom_we_list_and_we_whom_it_lists(net: Net, tmp_path: Path) -> None:
    server = await net.add(direct=False)
    reader = await net.add(direct=False)
    await server.announce()
    with trio.fail_after(120):
        async with go_peer(tmp_path, "-relay=false", "-dht") as (addr, go):
            await go.connect(server.host.addrs[0])
            while server.peer_id not in await go.providers(swarm_key(MODEL)):
                await trio.sleep(0.05)  # it has not yet been told that we speak Kademlia
            await go.provide(swarm_key(MODEL))
            named = addr.rpartition("/p2p/")[2]
            assert named in await reader.directory.find_providers(swarm_key(MODEL))


async def test_go_puts_and_gets_public_keys_and_refuses_what_it_can_not_check(net: Net, tmp_path: Path) -> None:
    """Of values, go's nodes keep those whose validator they have."""
    server = await net.add(direct=False)
    await server.announce()
    key = ID.from_base58(server.peer_id)
    with trio.fail_after(120):
        async with go_peer(tmp_path, "-relay=false", "-dht") as (_, go):
            await go.connect(server.host.addrs[0])
            while not await go.knows_nodes():
                await trio.sleep(0.05)
            public = server.identity.public_key
            await go.put(b"/pk/" + key.to_bytes(), public)
            assert server.directory._dht.value_store.get(b"/pk/" + key.to_bytes()).value == public
            assert await go.get(b"/pk/" + key.to_bytes()) == public
            with pytest.raises(AssertionError, match="invalid record keytype"):
                await go.get(record_key(MODEL, server.peer_id).encode())
