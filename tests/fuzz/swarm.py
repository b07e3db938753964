"""What a stranger can tell the directory: records, Kademlia's questions and answers, addresses and names of peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import base58
from google.protobuf.message import DecodeError
from libp2p.crypto.ed25519 import create_new_key_pair as new_ed25519
from libp2p.kad_dht import value_store
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record
from libp2p.network.exceptions import SwarmException
from libp2p.peer.envelope import seal_record
from libp2p.peer.id import ID
from libp2p.peer.peer_record import PeerRecord
from libp2p.peer.peerstore import env_to_send_in_RPC
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.dht.directory import Directory, _peers, open_directory
from petals.dht.keys import NAMESPACE, record_key, swarm_key
from petals.dht.records import DOMAIN, RecordError, ServerRecord, ServerState, open_record, peek, sign_record
from petals.dht.records_pb2 import SignedRecord
from petals.peer.base.identity import Identity, _identity, verify
from petals.peer.membership.record_exchange import fetch_record
from petals.peer.net.host import Host, HostConfig, open_host
from petals.protocols.errors import ProtocolViolation, SwarmError
from petals.protocols.framing import encode_frame
from petals.protocols.types import MAX_PEER_ID_BYTES, ModelId, PeerId
from tests.fuzz.loop import played, the_loop

MODEL = ModelId("tiny", "ab" * 32)


@cache
def me() -> Identity:
    """Who signs; the same in every run, so that what is committed stays valid."""
    return _identity(new_ed25519(seed=bytes(32)))


def a_record(**changes: Any) -> ServerRecord:
    """A valid one."""
    fields: dict[str, Any] = {
        "model": MODEL, "peer_id": me().peer_id, "blocks": range(4), "num_blocks": 4, "state": ServerState.ONLINE,
        "addrs": ("/ip4/127.0.0.1/tcp/4001/p2p/" + me().peer_id,), "version": "0.1.0", "adapters": ("lora",),
        "inference_rps": 100.0, "forward_rps": 5.0, "cache_tokens_left": 1000,
        "round_trips_s": {me().peer_id: 0.01}, "sequence": 1, "issued_at": 1e9, "expires_at": 1e9 + 3600,
    }  # fmt: skip
    return ServerRecord(**{**fields, **changes})


def records(data: bytes) -> None:
    """A signed record as it comes; and one that its peer has really signed, whatever is in it."""
    peer = me()
    signed = SignedRecord(public_key=peer.public_key, record=data, signature=peer.sign(DOMAIN + data))
    for value, check in ((data, verify), (signed.SerializeToString(), verify), (signed.SerializeToString(), _anyone)):
        with suppress(RecordError):
            record = open_record(value, now=1e9 + 1, verify=check, expected_model=None)
            assert len(value) <= 16 << 10
            assert record.blocks.stop <= 4096
            assert record.expires_at > 1e9 + 1
            assert check is _anyone or record.peer_id == peer.peer_id
        with suppress(RecordError):
            peek(value)


def _anyone(*_: object) -> bool:
    return True


def records_seeds() -> list[bytes]:
    """Envelope and content."""
    signed = sign_record(a_record(), me().sign, me().public_key)
    return [signed, SignedRecord.FromString(signed).record]


# -- Kademlia ---------------------------------------------------------------------------------------------------------


@cache
def node() -> tuple[Host, Directory]:
    """A node of the directory that listens nowhere."""
    host = the_loop().enter(open_host(me().key_pair, HostConfig(listen=(), connect_s=0.01)))
    fetch = partial(fetch_record, host)
    directory = the_loop().enter(open_directory(host, me(), verify, fetch_direct=fetch, clock=_now))
    return host, directory


def _now() -> float:
    return 1e9 + 1


_CLOCK = SimpleNamespace(time=_now)

_hidden: list[Exception] = []
"""What our stores and checks have raised inside of the library's handler, which takes any exception for an answer."""


def _noted(method: Callable[..., Any], promised: tuple[type[Exception], ...] = ()) -> Callable[..., Any]:
    def noting(*args: Any) -> Any:
        try:
            return method(*args)
        except promised:
            raise
        except Exception as error:
            _hidden.append(error)
            raise

    return noting


@cache
def _dht() -> Any:
    """The Kademlia node of `node()`, whose own parts are watched."""
    dht: Any = node()[1]._dht
    records = dht.validator._validators[NAMESPACE]
    records.validate = _noted(records.validate, (RecordError,))
    records.select = _noted(records.select)
    dht.value_store.put_record = _noted(dht.value_store.put_record)
    dht.provider_store.add_provider = _noted(dht.provider_store.add_provider)
    dht.provider_store.get_providers = _noted(dht.provider_store.get_providers)
    return dht


def _emptied(dht: Any) -> Any:
    """Every input meets the same node: nothing stored, and a stranger who has not said too much yet."""
    for key in list(dht.value_store.store):
        dht.value_store.remove(key)
    stores = (dht.value_store._keys_of, dht.provider_store.providers)
    for table in (*stores, dht.provider_store._keys_of, dht._provider_rate_limits):
        table.clear()
    return dht


class _Conn:
    def __init__(self, peer_id: ID) -> None:
        self.peer_id = peer_id


class _Stream:
    """A peer's stream as the library's handlers take it."""

    def __init__(self, data: bytes, peer_id: ID) -> None:
        self._left, self.muxed_conn = data, _Conn(peer_id)
        self.said_bytes = 0

    async def read(self, n: int | None = None) -> bytes:
        taken = self._left[:n]
        self._left = self._left[len(taken) :]
        return taken

    async def write(self, data: bytes) -> None:
        self.said_bytes += len(data)

    async def close(self) -> None: ...

    async def reset(self) -> None: ...

    def get_remote_address(self) -> tuple[str, int]:
        return "127.0.0.1", 1


@cache
def _stranger() -> Identity:
    return _identity(new_ed25519(seed=bytes([1] * 32)))


_b58encode = base58.b58encode


def _text_of(name: bytes) -> bytes:
    """Takes the square of its length, so nobody may ask for that of a long one; who logs it, catches what we raise."""
    if len(name) > MAX_PEER_ID_BYTES:
        _hidden.append(AssertionError(f"{len(name)} bytes as base58"))
    encoded: bytes = _b58encode(name)
    return encoded


@contextmanager
def nothing_hidden() -> Iterator[None]:
    """Raise at the end what was caught on the way."""
    with patch.object(base58, "b58encode", _text_of):
        yield
    if hidden := _hidden.copy():
        _hidden.clear()
        raise hidden[0]


@nothing_hidden()
def kademlia(data: bytes) -> None:
    """All that a stranger asks on one stream, in frames; and the same bytes as the answer to a question of ours."""
    host, directory = node()
    dht = _emptied(_dht())
    stream: Any = _Stream(data, ID.from_base58(_stranger().peer_id))
    with suppress(ProtocolViolation), patch.object(value_store, "time", _CLOCK):  # it has no clock of ours
        the_loop().run(partial(dht.handle_stream, stream))
    assert stream.said_bytes < 4 << 20
    message = Message()
    with suppress(DecodeError):  # as `_exchange` does
        message.ParseFromString(data)
    for _, addrs in _peers([*message.closerPeers, *message.providerPeers]):
        assert len(addrs) <= 16

    async def open_stream(*_: object, **__: object) -> object:
        return (await played(data))[0]

    async def ask() -> None:
        ask_others, host.open_stream = host.open_stream, open_stream  # type: ignore[method-assign, assignment]
        try:
            await directory._ask(_stranger().peer_id, Message(type=message.type))
        finally:
            host.open_stream = ask_others  # type: ignore[method-assign]

    the_loop().run(ask)


def kademlia_seeds() -> list[bytes]:
    """One of each question, and an answer that names peers."""
    host, _ = node()
    kinds = Message.MessageType
    record = sign_record(a_record(peer_id=_stranger().peer_id, issued_at=1e9, expires_at=1e9 + 3000),
                         _stranger().sign, _stranger().public_key)  # fmt: skip
    key = record_key(MODEL, _stranger().peer_id).encode()
    provide = Message(type=kinds.ADD_PROVIDER, key=bytes.fromhex(swarm_key(MODEL)))
    stranger = ID.from_base58(_stranger().peer_id).to_bytes()
    address = bytes.fromhex("047f000001060fa1")
    where = PeerRecord(ID(stranger), [Multiaddr(address)], seq=1)
    itself = seal_record(where, _stranger().key_pair.private_key).marshal_envelope()
    provide.providerPeers.add(id=stranger, addrs=[address])
    answer = Message(type=kinds.GET_PROVIDERS, key=provide.key)
    answer.closerPeers.add(id=stranger, addrs=[address] * 3)
    answer.providerPeers.add(id=stranger, addrs=[address])
    questions = [
        Message(type=kinds.PING),
        Message(type=kinds.FIND_NODE, key=stranger, senderRecord=env_to_send_in_RPC(host.libp2p)[0]),
        provide,
        Message(type=kinds.GET_PROVIDERS, key=provide.key),
        Message(type=kinds.PUT_VALUE, key=key, record=Record(key=key, value=record)),
        Message(type=kinds.GET_VALUE, key=key),
    ]
    frames = [encode_frame(message.SerializeToString()) for message in questions]
    *_, get_providers, put, get = frames
    find = encode_frame(Message(type=kinds.FIND_NODE, key=stranger, senderRecord=itself).SerializeToString())
    provide.providerPeers[0].signedRecord = itself
    named = encode_frame(provide.SerializeToString())
    all_taken = put + get + named + get_providers + put + find
    said = answer.SerializeToString()
    return [*frames, b"".join(frames), named, find, all_taken, said, encode_frame(said)]


# -- addresses and names -----------------------------------------------------------------------------------------------


def peers(data: bytes) -> None:
    """Addresses and peer IDs as flags, records and pushes bring them, as text and in bytes."""
    host, _ = node()
    text = data.decode("utf-8", "replace")
    words = text.split("\n")
    _peers([Message.Peer(id=data[:40], addrs=[data, data[40:]])])

    async def reach() -> None:
        async def nobody(peer_id: ID, addrs: object) -> None:
            raise SwarmException("not really")

        dial, host._network.dial = host._network.dial, nobody  # type: ignore[method-assign, assignment]
        try:
            with suppress(SwarmError):
                await host.connect(text)
            with suppress(SwarmError):
                await host.open_stream(PeerId(words[0]), "/petals/push/1.0.0", addrs=words[1:17])
            with suppress(SwarmError):
                await host.ping(PeerId(words[0]))
            for addr in words:
                with suppress(SwarmException):
                    _endpoint(addr)
        finally:
            host._network.dial = dial  # type: ignore[method-assign]

    the_loop().run(reach)


def _endpoint(addr: str) -> None:
    from petals.peer.net.wire.addresses import tcp_endpoint

    try:
        parsed = Multiaddr(addr)
    except Exception:  # the library's; `_known_addrs` and `connect` catch the same
        return
    tcp_endpoint(parsed)


def peers_seeds() -> list[bytes]:
    """Addresses of every kind we may hear of."""
    name = me().peer_id
    return [
        f"/ip4/127.0.0.1/tcp/4001/p2p/{name}".encode(),
        f"{name}\n/ip6/::1/tcp/4001\n/dns4/example.org/tcp/443/p2p/{name}\n/ip4/1.2.3.4/udp/1/quic-v1".encode(),
        f"/ip4/1.2.3.4/tcp/1/p2p/{name}/p2p-circuit/p2p/{name}".encode(),
        ID.from_base58(name).to_bytes() + bytes.fromhex("047f000001060fa1"),
    ]
