"""Servers announce, readers look up, over Kademlia. The only file of this room that knows libp2p.

Theory. A server *provides* the model's key (a standard provider record, so that any libp2p DHT node can hold it) and
stores its signed record under a key of its own. A reader collects providers, then asks each for its record directly,
all at once and with a short deadline; who does not answer costs nothing but that deadline, which all share.

Of py-libp2p 0.8.1 we keep what answers others and who is near: `KadDHT`'s stream handler and routing table. Searching
and storing is ours, over the same wire protocol, since the library's

- searches wait 10 s for each frozen node, and take a key of more than 50 bytes for none (dht/walk.py waits for nobody);
- `find_providers` and `get_value` answer from the local store without asking anybody, and leave copies for a day;
- nodes keep 20 providers of a key, the first 20 for 48 hours, so that the dead crowd out the living (`_Providers`);
- nodes keep what anybody stores until 50,000 values are there, then drop the oldest, whose ever it is (`_Values`);
- routing tables stay empty after connecting, and keep the dead: both are seen to here.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from itertools import chain, zip_longest
from typing import Protocol

import libp2p.kad_dht.kad_dht
import multihash  # type: ignore[import-untyped]
import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record
from libp2p.kad_dht.provider_store import ProviderRecord, ProviderStore
from libp2p.kad_dht.value_store import ValueStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.peer.peerstore import env_to_send_in_RPC
from libp2p.records.pubkey import PublicKeyValidator
from libp2p.records.validator import NamespacedValidator, Validator
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.dht.keys import NAMESPACE, is_record_key, record_key, swarm_key
from petals.dht.records import RecordError, ServerRecord, ServerState, Verify, open_record, peek, sign_record
from petals.dht.troubles import Namesake, Refusals
from petals.dht.walk import walk
from petals.protocols.errors import PeerUnreachable, ProtocolViolation, SwarmError
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.types import MAX_PEER_ID_BYTES, ModelId, PeerId

log = logging.getLogger(__name__)

STORE_AT = 12
"""Holders of each record: of so many nearest nodes half may leave between two announcements."""
READ_FROM = 6
"""Holders a reader waits for."""
PATIENCE_S = 0.4
"""A node that takes longer is not waited for while others answer."""
WALK_S = 2.0
"""One search, whatever happens."""
FETCH_S = 1.0
"""One server's record from itself. A server that answered before keeps its last record when it is late."""
SUSPECT_S = 0.4
"""The same, for who did not answer last time."""
LOOKUP_S = 5.0
"""All of a lookup, however many providers are named."""
RENEW_S = 0.5
"""The same, for a reader that knows servers: these answer within a few round trips, or keep their last word."""
STORE_S = 5.0
"""All of an announcement."""
RPC_S = 2.0
"""One question to one node, dialling it included."""
GOODBYE_S = 0.5
"""Resetting a stream whose question was cut off."""

MAX_INBOUND = 64
"""Questions answered at once; more are reset (the library: 12, which a few readers fill)."""
MAX_INBOUND_PER_PEER = 8
"""The same of one peer; else one who asks nothing on 64 streams would make a node deaf."""
INBOUND_S = 20.0
"""One stream of questions; the library waits for the next one for ever."""
MAX_INBOUND_BYTES = 256 << 10
"""The same; a record has 8 KiB at most, and the library reads up to 4 MiB of each question."""
STREAM_COSTS = 4
"""Of those that a peer may open in a second: keeping what others say takes signatures."""
MAX_FETCHES = 64
"""Servers asked for their records at once."""
MAX_PROVIDERS = 2000
"""Per key."""
MAX_KEYS_PER_WRITER = 64
"""Content keys and values that one peer may have stored here."""
MAX_CONTENT_KEYS = 10_000
MAX_VALUES_BYTES = 32 << 20
"""Values of all writers; the writer that has most loses its oldest ones first."""
MAX_WRITER_BYTES = 256 << 10
"""Of one writer."""
MAX_KEY_RECORD_BYTES = 1 << 10
"""A public key that others want us to keep; 640 bytes are accepted of one (peer/base/public_key.py)."""
MAX_PROVIDER_RECORDS = 16_384
"""Of all keys, with up to 16 addresses each."""
MAX_FOREIGN_VALUES = 1024
"""Values that are not ours (public keys, which name nobody who could be limited)."""
PROVIDER_TTL_S = 3600.0
"""A record lives at most an hour: who has not provided for so long is gone."""
MAX_MESSAGE_BYTES = 4 << 20
MAX_CLOSER = 64
MAX_ADDRS = 16
MAX_ADDR_BYTES = 256
_MEET_AGAIN_S = (0.2, 0.5, 1.0, 2.0, 5.0)
"""A new peer enters the routing table once identify has told its addresses."""

FetchDirect = Callable[[PeerId, tuple[str, ...], ModelId], Awaitable[bytes | None]]
"""Asks a server itself for its signed record of a model; None: it serves no such model. Raises SwarmError."""


class Connected(Protocol):
    """What the directory needs of a host."""

    libp2p: IHost
    peer_id: PeerId

    def on_peer(self, callback: Callable[[PeerId], None]) -> None: ...

    def connected_peers(self) -> tuple[PeerId, ...]: ...

    def charge(self, peer_id: PeerId, streams: int) -> None: ...

    def plausible(self, namer: PeerId, addrs: Sequence[str]) -> tuple[str, ...]: ...

    async def open_stream(self, peer_id: PeerId, protocol: str, *, addrs: Sequence[str] = ()) -> ByteStream: ...


class Signer(Protocol):
    """What the directory needs of an identity."""

    @property
    def public_key(self) -> bytes: ...

    def sign(self, data: bytes) -> bytes: ...


class Directory:
    """What the swarm knows. Made by `open_directory`."""

    _nursery: trio.Nursery
    """Runs searches that outlast their lookup."""

    def __init__(
        self,
        dht: KadDHT,
        providers: _Providers,
        host: Connected,
        signer: Signer,
        verify: Verify,
        fetch_direct: FetchDirect | None,
        clock: Callable[[], float],
    ) -> None:
        self._searches: dict[str, trio.Event] = {}
        """By digest: what is set when the search for newcomers that is under way has ended."""
        self._dht = dht
        self._provided = providers
        self._host = host
        self._signer = signer
        self._verify = verify
        self._fetch_direct = fetch_direct
        self._clock = clock
        self._own: dict[str, ServerRecord] = {}
        self._known: dict[tuple[str, PeerId], ServerRecord] = {}
        self._suspects: set[PeerId] = set()
        self._addrs: dict[PeerId, tuple[str, ...]] = {}
        """Of nodes that others have named."""
        self.dropped_records: Counter[str] = Counter()
        """Records that were not believed so far, by why: what servers said of themselves, and what others wanted us to
        keep."""
        self.refusals = Refusals(clock)
        """The same, for people."""
        self.namesake = Namesake(secrets.token_bytes(8), clock)
        """Another process with our key."""
        self._deaf: set[PeerId] = set()
        """Nodes that answer us only without our own record."""
        self.asked = 0
        """Questions sent to other nodes, so far."""

    async def announce(self, record: ServerRecord) -> None:
        """Sign the record, store it and provide the model's key; bounded by `STORE_S`.

        Nobody being there to store it is no error: the next peer to join asks us.
        """
        self._own[record.model.digest] = record
        data = sign_record(record, self._signer.sign, self._signer.public_key)
        with trio.move_on_after(STORE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._store, record_key(record.model, record.peer_id).encode(), data)
                if record.state is not ServerState.OFFLINE:
                    nursery.start_soon(self._provide, bytes.fromhex(swarm_key(record.model)))

    async def withdraw(self, record: ServerRecord) -> None:
        """Store an OFFLINE record, and stop providing."""
        self._provided.drop(bytes.fromhex(swarm_key(record.model)), self._host.peer_id)
        await self.announce(record)

    async def lookup(self, model: ModelId) -> tuple[ServerRecord, ...]:
        """All live servers' records of a model, one per peer; bounded by `LOOKUP_S`, usually by the slowest live one.

        A reader that knows servers waits `RENEW_S` at most: for those, which it asks at once, and for newcomers, which
        are looked for meanwhile. A newcomer that takes longer is listed by a later lookup. A server that is late, but
        whose last record has not expired, is listed with that; one that refuses is not.
        """
        # Who answered before is asked again whatever the nodes near the key say: in a burst of newcomers those may all
        # be too busy to say anything, while the servers themselves answer as ever.
        before = self._live(model)
        search = self._searches.get(model.digest)
        if search is None:
            search = self._searches[model.digest] = trio.Event()
            self._nursery.start_soon(self._meet_newcomers, model, search)
        answered: set[PeerId] = set()

        async def ask(peer_id: PeerId, addrs: tuple[str, ...]) -> None:
            await self._fetch(peer_id, addrs, model)
            answered.add(peer_id)

        with trio.move_on_after(RENEW_S if before else LOOKUP_S):
            async with trio.open_nursery() as nursery:
                for peer_id, record in before.items():
                    nursery.start_soon(ask, peer_id, record.addrs)
                await search.wait()
        self._suspects.update(before.keys() - answered)
        found = self._live(model)
        own = self._own.get(model.digest)  # never asked for over the network
        if own is not None and self._is_live(own):
            found[own.peer_id] = own
        return tuple(found[peer_id] for peer_id in sorted(found))

    def warnings(self) -> list[str]:
        """What people should hear of, in sentences."""
        return [*self.refusals.sentences(), *self.namesake.sentences()]

    async def look_for_namesake(self, model: ModelId) -> list[str]:
        """Whether a server of `model` has our own key, which makes it invisible to us; bounded by `WALK_S`.

        Returns: a sentence, or none. Raises nothing.
        """
        if model.digest in self._own:
            return self.namesake.sentences()
        found: list[ServerRecord] = []
        key = record_key(model, self._host.peer_id).encode()

        def note(_: PeerId, reply: Message) -> None:
            record = self._own_record(reply, key)
            if record is not None and self._is_live(record):
                found.append(record)

        await self._walk(key, Message(type=Message.MessageType.GET_VALUE, key=key), note, want=READ_FROM)
        if not found:
            return []
        blocks = max(found, key=lambda record: record.sequence).blocks
        return [
            f"a server with this peer's own key announced blocks {blocks.start}:{blocks.stop} within the last minutes, "
            "and a peer does not ask itself; give each process its own --identity"
        ]

    async def provide(self, key: str) -> None:
        """Be listed under a content key for an hour; bounded by `STORE_S`."""
        with trio.move_on_after(STORE_S):
            await self._provide(bytes.fromhex(key))

    async def find_providers(self, key: str) -> dict[PeerId, tuple[str, ...]]:
        """Who is listed under a content key, with addresses; bounded by `LOOKUP_S`."""
        with trio.move_on_after(LOOKUP_S):
            return await self._providers(bytes.fromhex(key))
        return {}

    def forget(self, model: ModelId, peer_id: PeerId) -> None:
        """A server was found dead: do not list it again before it has answered."""
        self._known.pop((model.digest, peer_id), None)
        self._suspects.add(peer_id)

    async def refresh(self) -> None:
        """Meet the nodes nearest to ourselves, and those on the way to somewhere else."""
        for key in (self._dht.local_peer_id.to_bytes(), secrets.token_bytes(32)):
            await self._walk(key, Message(type=Message.MessageType.FIND_NODE, key=key), want=STORE_AT)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _live(self, model: ModelId) -> dict[PeerId, ServerRecord]:
        """What servers of a model have said of themselves that holds still."""
        return {
            peer_id: record
            for (digest, peer_id), record in self._known.items()
            if digest == model.digest and self._is_live(record)
        }

    async def _meet_newcomers(self, model: ModelId, done: trio.Event) -> None:
        """Ask the nodes near the key for servers, and those of them that are not known by then for their records.

        The directory's task and not the reader's: a newcomer in a crowd may take longer than a reader should wait, and
        what has been learned by then is not begun anew with the next lookup."""
        try:
            with trio.move_on_after(LOOKUP_S):
                providers = await self._providers(bytes.fromhex(swarm_key(model)))
                limit = trio.CapacityLimiter(MAX_FETCHES)

                async def meet(peer_id: PeerId) -> None:
                    async with limit:
                        await self._fetch(peer_id, providers[peer_id], model)

                async with trio.open_nursery() as nursery:
                    for peer_id in sorted(providers.keys() - self._live(model), key=self._suspects.__contains__):
                        nursery.start_soon(meet, peer_id)
        finally:
            del self._searches[model.digest]
            done.set()

    async def _fetch(self, peer_id: PeerId, addrs: tuple[str, ...], model: ModelId) -> ServerRecord | None:
        """A server's record, checked: from itself, or its last one while that holds and it is merely late."""
        key = (model.digest, peer_id)
        try:
            with trio.move_on_after(SUSPECT_S if peer_id in self._suspects else FETCH_S) as scope:
                words = await self._words(peer_id, addrs, model)
        except SwarmError as error:
            log.debug("no record from …%s itself: %s", peer_id[-6:], error)
            self.forget(model, peer_id)  # it does not answer, so it would not serve either
            return None
        if scope.cancelled_caught:
            self._suspects.add(peer_id)
            known = self._known.get(key)
            return known if known is not None and self._is_live(known) else None
        self._suspects.discard(peer_id)
        records = [record for record in (self._open(data, model, peer_id) for data in words) if record is not None]
        if records and (known := self._known.get(key)) is not None:
            self.dropped_records["replayed"] += sum(record.sequence < known.sequence for record in records)
            records.append(known)  # so that an old record played again is not believed
        record = max(records, key=lambda record: record.sequence, default=None)
        if record is None or not self._is_live(record):
            self._known.pop(key, None)
            return None
        self._known[key] = record
        return record

    def _is_live(self, record: ServerRecord) -> bool:
        return record.state is not ServerState.OFFLINE and self._clock() < record.expires_at

    def _open(self, data: bytes, model: ModelId, peer_id: PeerId) -> ServerRecord | None:
        try:
            record = open_record(data, now=self._clock(), verify=self._verify, expected_model=model)
            if record.peer_id != peer_id:
                raise RecordError("a record of another peer", "peer")
        except RecordError as error:
            self.dropped_records[error.reason] += 1
            self.refusals.note(peer_id, error, fresh=self._fetch_direct is not None)
            log.info("dropped what …%s says: %s", peer_id[-6:], error)
            return None
        self.refusals.forgive(peer_id)
        return record

    async def _words(self, peer_id: PeerId, addrs: tuple[str, ...], model: ModelId) -> list[bytes]:
        """What a server says of itself, or else what the nodes near its key have kept of that; nothing checked yet."""
        if self._fetch_direct is not None:
            data = await self._fetch_direct(peer_id, addrs, model)
            return [] if data is None else [data]
        key = record_key(model, peer_id).encode()
        local = self._dht.value_store.get(key)
        values = set() if local is None else {local.value}

        def note(_: PeerId, reply: Message) -> None:
            if reply.HasField("record") and reply.record.key == key:
                values.add(reply.record.value)

        await self._walk(key, Message(type=Message.MessageType.GET_VALUE, key=key), note, want=READ_FROM)
        return list(values)

    async def _providers(self, key: bytes) -> dict[PeerId, tuple[str, ...]]:
        """Who provides a key, with addresses, as the nodes near it and our own store say."""
        lists: list[list[tuple[PeerId, tuple[str, ...]]]] = [
            [
                (PeerId(str(info.peer_id)), tuple(str(addr) for addr in info.addrs))
                for info in self._dht.provider_store.get_providers(key)
            ]
        ]

        def note(namer: PeerId, reply: Message) -> None:
            lists.append(self._named(namer, reply.providerPeers[:MAX_PROVIDERS]))

        request = Message(type=Message.MessageType.GET_PROVIDERS, key=key)
        await self._walk(key, request, note, want=READ_FROM)
        found: dict[PeerId, tuple[str, ...]] = {}
        # In turns, so that a holder who names thousands cannot push out what the others name.
        for entry in chain.from_iterable(zip_longest(*lists)):
            if entry is not None and entry[0] != self._host.peer_id and len(found) < MAX_PROVIDERS:
                found.setdefault(entry[0], entry[1])
        return found

    def _named(self, namer: PeerId, entries: Sequence[Message.Peer]) -> list[tuple[PeerId, tuple[str, ...]]]:
        """Peers of an answer, with those of their addresses that who answers may name."""
        return [(peer_id, self._host.plausible(namer, addrs)) for peer_id, addrs in _peers(entries)]

    # -- writing ---------------------------------------------------------------------------------------------------

    async def _store(self, key: bytes, data: bytes) -> None:
        record = Record(key=key, value=data)
        self._dht.value_store.put_record(key, record)

        def note(_: PeerId, reply: Message) -> None:
            if (kept := self._own_record(reply, key)) is not None:
                self.namesake.note(kept)

        nearest = await self._walk(key, Message(type=Message.MessageType.GET_VALUE, key=key), note, want=STORE_AT)
        await self._tell(nearest, Message(type=Message.MessageType.PUT_VALUE, key=key, record=record))

    def _own_record(self, reply: Message, key: bytes) -> ServerRecord | None:
        """What a node keeps under a key of ours, if it is signed with our key and holds still."""
        if not reply.HasField("record") or reply.record.key != key:
            return None
        try:
            record = open_record(reply.record.value, now=self._clock(), verify=self._verify)
        except RecordError:
            return None
        return record if record.peer_id == self._host.peer_id else None

    async def _provide(self, key: bytes) -> None:
        me = self._dht.local_peer_id
        addrs = list(self._host.libp2p.get_addrs())
        self._dht.provider_store.add_provider(key, PeerInfo(me, addrs))
        nearest = await self._walk(key, Message(type=Message.MessageType.FIND_NODE, key=key), want=STORE_AT)
        message = Message(type=Message.MessageType.ADD_PROVIDER, key=key)
        provider = message.providerPeers.add(id=me.to_bytes())
        provider.addrs.extend(addr.to_bytes() for addr in addrs)
        await self._tell(nearest, message)

    async def _tell(self, peers: Iterable[PeerId], message: Message) -> None:
        async with trio.open_nursery() as nursery:
            for peer_id in peers:
                nursery.start_soon(self._ask, peer_id, message)

    # -- searching -------------------------------------------------------------------------------------------------

    async def _walk(
        self, key: bytes, request: Message, note: Callable[[PeerId, Message], None] | None = None, *, want: int
    ) -> list[PeerId]:
        """The nodes nearest to `key` that answer `request`; `note` is told each answer."""
        target = _place(key)
        seeds = [PeerId(str(peer)) for peer in self._dht.routing_table.find_local_closest_peers(key)]

        async def ask(peer_id: PeerId) -> list[PeerId] | None:
            reply = await self._ask(peer_id, request)
            if reply is None:
                return None
            if note is not None:
                note(peer_id, reply)
            closer = self._named(peer_id, reply.closerPeers[:MAX_CLOSER])
            if len(self._addrs) > MAX_PROVIDERS:
                self._addrs.clear()  # who has answered is in the routing table by now
            self._addrs.update(closer)
            return [other for other, _ in closer if other != self._host.peer_id]

        return await walk(
            seeds,
            lambda peer_id: _place(ID.from_base58(peer_id).to_bytes()) ^ target,
            ask,
            want=want,
            patience_s=PATIENCE_S,
            total_s=WALK_S,
        )

    async def _ask(self, peer_id: PeerId, request: Message) -> Message | None:
        """One question to one node; None: no answer that makes sense, within `RPC_S`."""
        # `senderRecord` tells a node of the library our addresses, the ways through relays among them. One (0.8.1) that
        # has seen a newer record - of another process with our key, or of ours before the clock was set back - then
        # resets whatever we ask: it is asked without.
        self.asked += 1
        request.ClearField("senderRecord")
        if peer_id not in self._deaf:
            request.senderRecord = env_to_send_in_RPC(self._host.libp2p)[0]
        try:
            with trio.move_on_after(RPC_S):
                reply = await self._heard(peer_id, request)
                if reply is not None and reply.type == request.type:
                    await self._dht.add_peer(ID.from_base58(peer_id), skip_server_mode_check=True)
                    return reply
        except PeerUnreachable as error:
            log.debug("node …%s does not answer: %s", peer_id[-6:], error)
            self._dht.routing_table.remove_peer(ID.from_base58(peer_id))
        except SwarmError as error:
            log.debug("node …%s is of no use: %s", peer_id[-6:], error)
        return None

    async def _heard(self, peer_id: PeerId, request: Message) -> Message | None:
        """`_exchange`, once more without our record where that was reset at once."""
        try:
            return await self._exchange(peer_id, request)
        except PeerUnreachable:
            if not request.HasField("senderRecord") or peer_id not in self._host.connected_peers():
                raise
            request.ClearField("senderRecord")
            reply = await self._exchange(peer_id, request)
            if len(self._deaf) > MAX_PROVIDERS:
                self._deaf.clear()
            self._deaf.add(peer_id)
            return reply

    async def _exchange(self, peer_id: PeerId, request: Message) -> Message | None:
        stream = await self._host.open_stream(peer_id, str(PROTOCOL_ID), addrs=self._addrs.get(peer_id, ()))
        messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
        try:
            await messages.write_message(request.SerializeToString())
            if request.type == Message.MessageType.ADD_PROVIDER:  # go answers with silence, py with an echo
                await messages.close()
                return None
            data = await messages.read_message()
            await messages.close()
            return None if data is None else Message.FromString(data)
        except DecodeError:
            await messages.reset()
            return None
        except BaseException:
            with trio.CancelScope(deadline=trio.current_time() + GOODBYE_S, shield=True):
                await messages.reset()
            raise


def _place(key: bytes) -> int:
    """Where a key, or a peer ID in bytes, is in Kademlia's space."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big")


def _peers(entries: Iterable[Message.Peer]) -> list[tuple[PeerId, tuple[str, ...]]]:
    """Peers of a message with their addresses; what makes no sense is left out."""
    parsed = (
        _parse_peer(entry.id, tuple(addr for addr in entry.addrs[:MAX_ADDRS] if len(addr) <= MAX_ADDR_BYTES))
        for entry in entries
        if len(entry.id) <= MAX_PEER_ID_BYTES
    )
    return [peer for peer in parsed if peer is not None]


@lru_cache(2 * MAX_PROVIDERS)  # what is kept is small; six holders name the same servers again and again
def _parse_peer(raw_id: bytes, raw_addrs: tuple[bytes, ...]) -> tuple[PeerId, tuple[str, ...]] | None:
    addrs = []
    try:
        multihash.decode(raw_id)
        peer_id = PeerId(ID(raw_id).to_base58())
    except Exception:  # it raises half a dozen unrelated kinds
        return None
    for raw in raw_addrs:
        with suppress(Exception):
            addrs.append(str(Multiaddr(raw)))
    return peer_id, tuple(addrs)


class _StrangersId(ID):
    """A name in a question. The library (0.8.1) writes those that it refuses into its log, whatever their length."""

    def __init__(self, peer_id_bytes: bytes) -> None:
        if len(peer_id_bytes) > MAX_PEER_ID_BYTES:
            raise ValueError(f"a peer ID of {len(peer_id_bytes)} bytes")
        super().__init__(peer_id_bytes)


libp2p.kad_dht.kad_dht.ID = _StrangersId  # type: ignore[attr-defined]


class _Kademlia(KadDHT):
    """The library's node, but for how it refreshes its routing table, at the start and every ten minutes: a search of
    its own for each bucket, more than a thousand questions for a newcomer to a swarm of 40."""

    refresh: Callable[[], Awaitable[None]]
    charge: Callable[[PeerId, int], None]
    _inbound: Counter[ID]

    async def refresh_routing_table(self) -> None:
        await self.refresh()

    async def handle_stream(self, stream: INetStream) -> None:
        """Answer one stream, for a while, unless its peer has enough of them.

        Raises:
            ProtocolViolation: the peer says too much.
        """
        peer_id = stream.muxed_conn.peer_id
        self.charge(PeerId(str(peer_id)), STREAM_COSTS - 1)
        if self._inbound[peer_id] >= MAX_INBOUND_PER_PEER:
            await stream.reset()
            return
        self._inbound[peer_id] += 1
        try:
            measured = _Measured(stream)
            with trio.move_on_after(INBOUND_S) as scope:
                await super().handle_stream(measured)
            if scope.cancelled_caught:
                await stream.reset()
            if measured.left < 0:
                raise ProtocolViolation(f"over {MAX_INBOUND_BYTES} bytes of questions on one stream")
        finally:
            self._inbound[peer_id] -= 1
            if not self._inbound[peer_id]:
                del self._inbound[peer_id]


class _Measured(INetStream):
    """A stream of questions that ends after `MAX_INBOUND_BYTES`."""

    def __init__(self, stream: INetStream) -> None:
        self._stream = stream
        self.muxed_conn = stream.muxed_conn
        self.metric_send_channel = None  # the library (0.8.1) takes every stream for its NetStream, which has one
        self.left = MAX_INBOUND_BYTES

    async def read(self, n: int | None = None) -> bytes:
        if (n or 1) > self.left:
            self.left = -1
            await self._stream.reset()
            return b""
        data = await self._stream.read(n)
        self.left -= len(data)
        return data

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def close(self) -> None:
        await self._stream.close()

    async def reset(self) -> None:
        await self._stream.reset()

    def get_protocol(self) -> TProtocol | None:
        return self._stream.get_protocol()

    def set_protocol(self, protocol_id: TProtocol) -> None:
        self._stream.set_protocol(protocol_id)

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._stream.get_remote_address()


class _RecordValidator(Validator):
    """Lets a peer store its own fresh, signed records under its own key, and nothing else."""

    def __init__(self, verify: Verify, clock: Callable[[], float]) -> None:
        self._verify, self._clock = verify, clock
        self.dropped: Counter[str] = Counter()

    def validate(self, key: str, value: bytes) -> None:
        try:
            self._check(key, value)
        except RecordError as error:
            self.dropped[error.reason] += 1
            raise

    def _check(self, key: str, value: bytes) -> None:
        record = open_record(value, now=self._clock(), verify=self._verify)
        if key != record_key(record.model, record.peer_id):
            raise RecordError("a record under the key of another peer or model", "key")

    def select(self, key: str, values: list[bytes]) -> int:
        best = max(range(len(values)), key=lambda index: peek(values[index]).sequence)
        self.dropped["replayed"] += best == 0 and peek(values[0]).sequence > peek(values[-1]).sequence
        return best


class _KeyValidator(PublicKeyValidator):
    """Public keys, as the library checks them, if they are no larger than keys are."""

    def validate(self, key: str, value: bytes) -> None:
        if len(value) > MAX_KEY_RECORD_BYTES:
            raise RecordError(f"a public key of {len(value)} bytes, at most {MAX_KEY_RECORD_BYTES}", "key")
        super().validate(key, value)


class _Values(ValueStore):
    """Values as long as they live, and a limited number per writer."""

    def __init__(self, host: IHost) -> None:
        super().__init__(host, host.get_id())
        self._keys_of: dict[PeerId | None, dict[bytes, None]] = {}
        self._bytes_of: Counter[PeerId | None] = Counter()
        self._held: dict[bytes, tuple[PeerId | None, int]] = {}
        """Of each key, its writer and size; all sizes together are `_bytes`."""
        self._bytes = 0

    def put_record(self, key: bytes, record: Record) -> None:
        """Store a record that the validator has let pass; the writer's oldest goes when it has too many."""
        writer = peek(record.value).peer_id if is_record_key(key) else None
        most = MAX_FOREIGN_VALUES if writer is None else MAX_KEYS_PER_WRITER
        most_bytes = MAX_FOREIGN_VALUES * MAX_KEY_RECORD_BYTES if writer is None else MAX_WRITER_BYTES
        size = len(key) + record.ByteSize()
        self.remove(key)
        keys = self._keys_of.setdefault(writer, {})
        while keys and (len(keys) >= most or self._bytes_of[writer] + size > most_bytes):
            self.remove(next(iter(keys)))
        while self._held and self._bytes + size > MAX_VALUES_BYTES:
            fattest = self._keys_of[max(self._bytes_of, key=self._bytes_of.__getitem__)]
            self.remove(next(iter(fattest)))
        super().put_record(key, record)
        self._keys_of.setdefault(writer, {})[key] = None
        self._bytes_of[writer] += size
        self._held[key] = (writer, size)
        self._bytes += size
        if writer is not None:
            self.store[key] = (record, peek(record.value).expires_at)

    def remove(self, key: bytes) -> bool:
        """Drop a value, and what is counted for it."""
        if (held := self._held.pop(key, None)) is not None:
            writer, size = held
            del self._keys_of[writer][key]
            self._bytes_of[writer] -= size
            self._bytes -= size
            if not self._keys_of[writer]:
                del self._keys_of[writer], self._bytes_of[writer]
        return bool(super().remove(key))

    def cleanup_expired(self) -> int:
        """Drop what has expired, and forget writers of whom nothing is left."""
        dropped = super().cleanup_expired()
        for key in [key for key in self._held if key not in self.store]:
            self.remove(key)
        return dropped


class _Providers(ProviderStore):
    """Provider records for many servers, none of which outlives its server by more than `PROVIDER_TTL_S`."""

    def __init__(self, host: IHost, clock: Callable[[], float]) -> None:
        super().__init__(host)
        self._clock = clock
        self._keys_of: Counter[str] = Counter()

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        """Store or renew, unless the peer or the key has too many."""
        name = str(provider.peer_id)
        entries = self.providers.get(key, {})
        if name not in entries:
            if self._is_full(key, name):
                self.cleanup_expired()
            if self._is_full(key, name):
                log.debug("no room for provider …%s", name[-6:])
                return
            self._keys_of[name] += 1
        # A provider's addresses go to everybody who asks for the key: fat ones would make the answer too long to read.
        addrs = [addr for addr in provider.addrs if len(addr.to_bytes()) <= MAX_ADDR_BYTES][:MAX_ADDRS]
        record = ProviderRecord(PeerInfo(provider.peer_id, addrs), self._clock())
        self.providers.setdefault(key, entries)[name] = record

    def get_providers(self, key: bytes) -> list[PeerInfo]:
        """Who has provided the key within `PROVIDER_TTL_S`."""
        self._drop_expired(key)
        return [record.provider_info for record in self.providers.get(key, {}).values()]

    def cleanup_expired(self) -> None:
        """Drop whoever has not renewed."""
        for key in list(self.providers):
            self._drop_expired(key)

    def _is_full(self, key: bytes, name: str) -> bool:
        return (
            self._keys_of[name] >= MAX_KEYS_PER_WRITER
            or self._keys_of.total() >= MAX_PROVIDER_RECORDS
            or len(self.providers.get(key, {})) >= MAX_PROVIDERS
            or (key not in self.providers and len(self.providers) >= MAX_CONTENT_KEYS)
        )

    def _drop_expired(self, key: bytes) -> None:
        oldest = self._clock() - PROVIDER_TTL_S
        entries = self.providers.get(key, {})
        for name in [name for name, record in entries.items() if record.timestamp < oldest]:
            self.drop(key, name)

    def drop(self, key: bytes, name: str) -> None:
        """Forget one provider of a key."""
        entries = self.providers.get(key, {})
        if entries.pop(name, None) is not None:
            self._keys_of[name] -= 1
            self._keys_of += Counter()  # forgets zeros
        if not entries:
            self.providers.pop(key, None)


@asynccontextmanager
async def open_directory(
    host: Connected,
    signer: Signer,
    verify: Verify,
    *,
    fetch_direct: FetchDirect | None = None,
    serve_others: bool = True,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[Directory]:
    """Run the Kademlia node of `host` until the context is left.

    Args:
        fetch_direct: asks a server itself for its record; None: only the DHT is asked.
        serve_others: keep records for others (not for a peer that stays a minute).
    """
    records = _RecordValidator(verify, clock)
    validator = NamespacedValidator({"pk": _KeyValidator(), NAMESPACE: records}, strict_validation=True)
    dht = _Kademlia(
        host.libp2p,
        DHTMode.SERVER if serve_others else DHTMode.CLIENT,
        validator=validator,
        validator_changed=True,
        strict_validation=True,
    )
    dht.charge = host.charge
    dht._inbound = Counter()
    dht.value_store = _Values(host.libp2p)
    dht.provider_store = providers = _Providers(host.libp2p, clock)
    dht._inbound_limiter.total_tokens = MAX_INBOUND
    tell_new_peer, new_peers = trio.open_memory_channel[PeerId](1024)

    def note(peer_id: PeerId) -> None:
        # In a burst some are missed; they are met again by walking.
        with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            tell_new_peer.send_nowait(peer_id)

    host.on_peer(note)
    directory = Directory(dht, providers, host, signer, verify, fetch_direct, clock)
    directory.dropped_records = records.dropped
    dht.refresh = directory.refresh
    async with background_trio_service(dht), trio.open_nursery() as nursery:
        directory._nursery = nursery

        async def welcome() -> None:
            async for peer_id in new_peers:
                nursery.start_soon(_meet, dht, peer_id)

        for peer_id in host.connected_peers():
            if not await dht.add_peer(ID.from_base58(peer_id)):
                nursery.start_soon(_meet, dht, peer_id)
        nursery.start_soon(welcome)
        try:
            yield directory
        finally:
            nursery.cancel_scope.cancel()


async def _meet(dht: KadDHT, peer_id: PeerId) -> None:
    """Put a new peer into the routing table, as soon as it has said where and what it is."""
    for wait_s in (0.0, *_MEET_AGAIN_S):
        await trio.sleep(wait_s)
        if await dht.add_peer(ID.from_base58(peer_id)):
            return
