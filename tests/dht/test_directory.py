"""The directory on real hosts: announce, look up, replace, withdraw, expire, and what strangers can not do."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import base58
import pytest
import trio
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.dht import directory as directory_module
from petals.dht.keys import record_key, swarm_key
from petals.dht.records import RecordError, ServerState, sign_record
from petals.peer.base.identity import create_identity
from petals.protocols.errors import PeerUnreachable
from petals.protocols.framing import encode_varint
from petals.protocols.info import INFO_V1
from petals.protocols.stream import MessageStream
from petals.protocols.types import MAX_PEER_ID_BYTES, ModelId, PeerId
from tests.dht.conftest import MODEL, Net, make_record


@pytest.mark.parametrize("direct", [True, False])
async def test_what_one_announces_all_find_until_it_is_withdrawn(net: Net, direct: bool) -> None:
    nodes = [await net.add(direct=direct) for _ in range(5)]
    first = await nodes[1].announce(blocks=range(2))
    second = await nodes[2].announce(blocks=range(2, 4))
    for node in nodes:
        found = await node.directory.lookup(MODEL)
        assert {record.peer_id: record.blocks for record in found} == {
            first.peer_id: range(2),
            second.peer_id: range(2, 4),
        }
    assert await nodes[4].directory.lookup(ModelId("tiny", "cd" * 32)) == ()  # another checkpoint of the same name

    moved = await nodes[1].announce(blocks=range(1, 4), sequence=first.sequence + 1)
    assert moved in await nodes[4].directory.lookup(MODEL)

    gone = replace(moved, state=ServerState.OFFLINE, sequence=moved.sequence + 1)
    nodes[1].served[:] = [gone]
    await nodes[1].directory.withdraw(gone)
    for node in nodes:
        assert [record.peer_id for record in await node.directory.lookup(MODEL)] == [second.peer_id]


async def test_a_late_joiner_finds_and_is_found(net: Net) -> None:
    a, b = await net.add(), await net.add()
    await b.announce()
    await net.stop(a)  # the only node that connected them
    late = await _join(net, b)
    await late.announce()
    assert {r.peer_id for r in await b.directory.lookup(MODEL)} == {b.peer_id, late.peer_id}
    assert {r.peer_id for r in await late.directory.lookup(MODEL)} == {b.peer_id, late.peer_id}


async def test_who_answered_before_is_asked_again_though_nobody_names_it(net: Net) -> None:
    now = [time.time()]
    server, reader = await net.add(), await net.add(clock=lambda: now[0])
    await server.announce()
    assert len(await reader.directory.lookup(MODEL)) == 1
    for node in (server, reader):  # as if the nodes near the key were too busy to answer
        node.directory._provided.providers.clear()
    assert [record.peer_id for record in await reader.directory.lookup(MODEL)] == [server.peer_id]
    assert await reader.directory.lookup(ModelId("tiny", "cd" * 32)) == ()
    now[0] += 91  # its word has expired, and nobody names it
    assert await reader.directory.lookup(MODEL) == ()


async def test_who_knows_servers_does_not_wait_for_a_newcomer_and_finds_it_later(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_module, "FETCH_S", 60.0)
    monkeypatch.setattr(directory_module, "LOOKUP_S", 60.0)
    old, newcomer, reader = [await net.add() for _ in range(3)]
    await old.announce()
    assert len(await reader.directory.lookup(MODEL)) == 1
    await newcomer.announce()
    at_last, asked = trio.Event(), 0
    ask_at_once = reader.host.open_stream

    async def open_stream(peer_id: PeerId, protocol: str, *, addrs: tuple[str, ...] = ()) -> object:
        nonlocal asked
        if peer_id == newcomer.peer_id and protocol == INFO_V1:
            asked += 1
            await at_last.wait()
        return await ask_at_once(peer_id, protocol, addrs=addrs)

    monkeypatch.setattr(reader.host, "open_stream", open_stream)
    with trio.fail_after(30):
        for _ in range(2):
            assert [record.peer_id for record in await reader.directory.lookup(MODEL)] == [old.peer_id]
    assert asked == 1  # the second lookup did not begin anew
    search = reader.directory._searches[MODEL.digest]
    at_last.set()
    await search.wait()
    assert {r.peer_id for r in await reader.directory.lookup(MODEL)} == {old.peer_id, newcomer.peer_id}


async def test_who_is_reported_while_others_are_looked_for_is_asked_by_the_same_search(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, reader = await net.add(), await net.add()
    await server.announce()
    assert len(await reader.directory.lookup(MODEL)) == 1
    goes_on, find = trio.Event(), reader.directory._providers

    async def providers(key: bytes) -> object:
        await goes_on.wait()
        return await find(key)

    monkeypatch.setattr(reader.directory, "_providers", providers)
    assert len(await reader.directory.lookup(MODEL)) == 1  # and the search goes on
    search = reader.directory._searches[MODEL.digest]
    reader.directory.forget(MODEL, server.peer_id)  # it lost a stream, and lives
    goes_on.set()
    await search.wait()
    assert list(reader.directory._live(MODEL)) == [server.peer_id]


async def test_expired_records_vanish(net: Net) -> None:
    now = [time.time()]
    a, reader = await net.add(), await net.add(direct=False, clock=lambda: now[0])
    await a.announce()
    assert len(await reader.directory.lookup(MODEL)) == 1
    now[0] += 91
    assert await reader.directory.lookup(MODEL) == ()


async def test_a_killed_server_is_not_listed_and_a_frozen_one_costs_its_deadline(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [await net.add() for _ in range(4)]
    for node in nodes:
        await node.announce()
    reader = nodes[0]
    assert len(await reader.directory.lookup(MODEL)) == 4
    await net.stop(nodes[3])
    assert {r.peer_id for r in await reader.directory.lookup(MODEL)} == {n.peer_id for n in nodes[:3]}

    frozen = nodes[2].peer_id
    ask_others = reader.host.open_stream

    async def open_stream(peer_id: PeerId, protocol: str, *, addrs: tuple[str, ...] = ()) -> object:
        if peer_id == frozen:
            await trio.sleep_forever()
        return await ask_others(peer_id, protocol, addrs=addrs)

    monkeypatch.setattr(reader.host, "open_stream", open_stream)
    with trio.fail_after(10):  # the library's own searches would take 20 s
        found = {r.peer_id for r in await reader.directory.lookup(MODEL)}
    # Late, not dead: it keeps its last word until it expires, or until somebody who used it says otherwise.
    assert found == {n.peer_id for n in nodes[:3]}
    reader.directory.forget(MODEL, frozen)
    assert {r.peer_id for r in await reader.directory.lookup(MODEL)} == {n.peer_id for n in nodes[:2]}


async def test_a_peer_speaks_only_for_itself(net: Net) -> None:
    honest, liar, reader = await net.add(), await net.add(), await net.add()
    await honest.announce()
    stolen = make_record(honest.peer_id, blocks=range(1), sequence=1 << 60)
    # signed by the liar in the honest one's name, then honestly signed but under the other's key
    forged = sign_record(stolen, liar.identity.sign, liar.identity.public_key)
    validator = honest.directory._dht.validator
    assert validator is not None
    with pytest.raises(RecordError):
        validator.validate(record_key(MODEL, honest.peer_id), forged)
    own = sign_record(make_record(liar.peer_id), liar.identity.sign, liar.identity.public_key)
    with pytest.raises(RecordError):
        validator.validate(record_key(MODEL, honest.peer_id), own)

    await liar.announce()
    liar.signed = lambda digest: [forged]  # type: ignore[method-assign]
    assert [r.peer_id for r in await reader.directory.lookup(MODEL)] == [honest.peer_id]
    assert reader.directory.dropped_records == {"signature": 1}


async def test_an_old_record_played_again_is_not_believed(net: Net) -> None:
    server, reader = await net.add(), await net.add()
    old = await server.announce(blocks=range(2))
    new = await server.announce(blocks=range(2, 4), sequence=old.sequence + 1)
    assert await reader.directory.lookup(MODEL) == (new,)
    server.served[:] = [old]
    assert await reader.directory.lookup(MODEL) == (new,)


async def test_a_flood_of_one_writer_pushes_nobody_out(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "MAX_KEYS_PER_WRITER", 3)
    node = await net.add()
    honest, flooder = create_identity(), create_identity()
    store, provided = node.directory._dht.value_store, node.directory._provided

    def put(identity: object, digest: str) -> bytes:
        assert isinstance(identity, type(honest))
        record = make_record(identity.peer_id, model=ModelId("m", digest))
        key = record_key(record.model, identity.peer_id).encode()
        value = sign_record(record, identity.sign, identity.public_key)
        store.put_record(key, Record(key=key, value=value))
        provided.add_provider(bytes.fromhex(swarm_key(record.model)), _info(identity.peer_id))
        return key

    kept = put(honest, "00" * 32)
    flood = [put(flooder, f"{n:064x}") for n in range(1, 10)]
    assert store.get(kept) is not None
    assert [key for key in flood if store.get(key) is not None] == flood[-3:]
    assert provided.size() == 1 + 3
    assert len(provided.get_providers(bytes.fromhex(swarm_key(ModelId("m", "00" * 32))))) == 1


async def test_providers_that_do_not_renew_are_dropped(net: Net) -> None:
    now = [time.time()]
    node = await net.add(clock=lambda: now[0])
    key = bytes.fromhex(swarm_key(MODEL))
    node.directory._provided.add_provider(key, _info(create_identity().peer_id))
    assert len(node.directory._provided.get_providers(key)) == 1
    now[0] += directory_module.PROVIDER_TTL_S + 1
    assert node.directory._provided.get_providers(key) == []


async def test_the_dead_leave_the_routing_table(net: Net) -> None:
    a, b, c = [await net.add() for _ in range(3)]
    await c.announce()
    await a.directory.lookup(MODEL)
    table = a.directory._dht.routing_table
    with trio.fail_after(20):
        # Being met is the library's business, which gives no sign when it is done.
        while b.peer_id not in {str(peer) for peer in table.get_peer_ids()}:  # noqa: ASYNC110
            await trio.sleep(0.001)
    await net.stop(b)
    with pytest.raises(PeerUnreachable):
        await a.host.ping(b.peer_id)
    await a.directory.lookup(MODEL)
    assert b.peer_id not in {str(peer) for peer in table.get_peer_ids()}


def _info(peer_id: PeerId) -> object:
    return PeerInfo(ID.from_base58(peer_id), [])


async def _join(net: Net, node: object) -> object:
    net.nodes.remove(node)  # type: ignore[arg-type]
    net.nodes.insert(0, node)  # type: ignore[arg-type]
    return await net.add()


async def test_half_of_the_peers_vanish_at_once_and_nobody_dead_is_listed_or_waited_for(net: Net) -> None:
    nodes = [await net.add() for _ in range(16)]
    for node in nodes:
        await node.announce()
    staying, leaving = nodes[:8], nodes[8:]
    for node in leaving:
        await net.stop(node)
    for reader in staying:
        for _ in range(2):
            before = reader.directory.asked
            found = {record.peer_id for record in await reader.directory.lookup(MODEL)}
            assert found == {node.peer_id for node in staying}
            # A walk asks each node it hears of once, dead or not, and the dead refuse at once; the table's own walks of
            # upkeep, two of them, may fall into the same moment.
            assert reader.directory.asked - before <= 3 * len(nodes)


async def test_comings_and_goings_are_seen_by_the_next_lookup(net: Net) -> None:
    for _ in range(4):
        await (await net.add()).announce()
    for turn in range(12):
        if turn % 2:
            await net.stop(net.nodes[1 + turn % 3])
        else:
            await (await net.add()).announce()
        for reader in (net.nodes[0], net.nodes[-1]):
            found = {record.peer_id for record in await reader.directory.lookup(MODEL)}
            assert found == {node.peer_id for node in net.nodes}


async def test_what_is_not_believed_is_counted_by_why(net: Net) -> None:
    """Stored at a node by others, and told by servers of themselves."""
    node, server, reader = await net.add(), await net.add(), await net.add()
    validator = node.directory._dht.validator
    assert validator is not None
    signer, other = create_identity(), create_identity()

    def put(why: str, key: str, data: bytes) -> None:
        before = node.directory.dropped_records[why]
        with pytest.raises(RecordError):
            validator.validate(key, data)
        assert node.directory.dropped_records[why] == before + 1

    key = record_key(MODEL, signer.peer_id)
    signed = partial(sign_record, sign=signer.sign, public_key=signer.public_key)
    now = time.time()
    put("malformed", key, b"garbage")
    put("signature", key, sign_record(make_record(signer.peer_id), other.sign, other.public_key))
    put("time", key, signed(make_record(signer.peer_id, issued_at=now + 120, expires_at=now + 150)))
    put("time", key, signed(make_record(signer.peer_id, issued_at=now - 90, expires_at=now - 1)))
    put("key", record_key(MODEL, other.peer_id), signed(make_record(signer.peer_id)))
    put("key", key, signed(make_record(signer.peer_id, model=ModelId("tiny", "cd" * 32))))
    old, new = signed(make_record(signer.peer_id, sequence=1)), signed(make_record(signer.peer_id, sequence=2))
    assert validator.select(key, [new, old]) == 0
    assert validator.select(key, [old, new]) == 1
    assert node.directory.dropped_records["replayed"] == 1

    first = await server.announce(blocks=range(2))
    second = await server.announce(blocks=range(2, 4), sequence=first.sequence + 1)
    assert await reader.directory.lookup(MODEL) == (second,)
    server.served[:] = [first]
    await reader.directory.lookup(MODEL)
    assert reader.directory.dropped_records == {"replayed": 1}


async def test_a_fat_provider_does_not_hide_the_honest_ones(net: Net) -> None:
    """What one peer says about where it is goes into every answer about its key: it must not fill that answer."""
    holder, server, reader = await net.add(), await net.add(), await net.add()
    await server.announce()
    key = bytes.fromhex(swarm_key(MODEL))
    for _ in range(64):
        fat = create_identity()
        peer_id = ID.from_base58(fat.peer_id)
        addrs = [Multiaddr(b"\x90\x03" + encode_varint(60_000) + b"/" + b"x" * 59_999)] * 40
        holder.directory._provided.add_provider(key, PeerInfo(peer_id, addrs))
        holder.host.libp2p.get_peerstore().add_addrs(peer_id, addrs, 60)
    assert server.peer_id in {record.peer_id for record in await reader.directory.lookup(MODEL)}
    assert holder.host.libp2p.get_peerstore().addrs(peer_id) == []


async def test_a_name_of_any_length_is_never_written_as_text(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes the square of its length: one message of 128 KiB would stop a node for half a minute."""
    lengths: list[int] = []
    encode = base58.b58encode

    def measured(data: bytes) -> bytes:
        lengths.append(len(data))
        return encode(data)

    node, stranger = await net.add(), await net.add()
    monkeypatch.setattr(base58, "b58encode", measured)
    fat = b"\0" + encode_varint(1000) + bytes(1000)
    addr = Multiaddr("/ip4/127.0.0.1/tcp/1").to_bytes()
    honest = ID.from_base58(stranger.peer_id).to_bytes()
    said = Message(type=Message.MessageType.ADD_PROVIDER, key=b"key")
    for raw_id, raw_addr in ((fat, addr), (honest, addr), (honest, addr * 50)):
        said.providerPeers.add(id=raw_id, addrs=[raw_addr])

    messages = MessageStream(await stranger.host.open_stream(node.peer_id, str(PROTOCOL_ID)), max_message_bytes=1 << 16)
    await messages.write_message(said.SerializeToString())
    assert await messages.read_message() is not None
    assert [info.peer_id.to_bytes() for info in node.directory._provided.get_providers(b"key")] == [honest]

    assert directory_module._peers(said.providerPeers) == [
        (stranger.peer_id, ("/ip4/127.0.0.1/tcp/1",)),
        (stranger.peer_id, ()),
    ]
    assert 0 < max(lengths) <= MAX_PEER_ID_BYTES


async def test_who_asks_nothing_on_many_streams_makes_no_node_deaf(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "MAX_INBOUND", 12)
    node, silent, reader = await net.add(), await net.add(), await net.add()
    await node.announce()
    for _ in range(2 * directory_module.MAX_INBOUND_PER_PEER):
        await silent.host.open_stream(node.peer_id, str(PROTOCOL_ID))
    with trio.fail_after(20):
        while node.directory._dht._inbound[ID.from_base58(silent.peer_id)] < 8:  # noqa: ASYNC110
            await trio.sleep(0.001)
    for _ in range(3):
        answer = await reader.directory._ask(node.peer_id, Message(type=Message.MessageType.PING))
        assert answer is not None
    assert node.directory._dht._inbound[ID.from_base58(silent.peer_id)] == 8
