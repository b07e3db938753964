"""A js-libp2p node as part of our directory: it keeps what we store, and finds what we keep.

It can not store under our keys: py-libp2p 0.8.1 answers no FIND_NODE for a key of more than 50 bytes, which js asks
first.
"""

from __future__ import annotations

from typing import Any

import pytest
import trio
from libp2p.kad_dht.pb.kademlia_pb2 import Message

from petals.dht.keys import record_key, swarm_key
from petals.dht.records import open_record
from petals.peer.identity import verify
from petals.protocols.types import PeerId
from tests.dht.conftest import MODEL, Net
from tests.dht.conftest import net as net  # a fixture
from tests.interop.foreign import js_peer

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
