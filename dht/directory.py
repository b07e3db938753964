"""Servers announce, readers look up, over Kademlia. The only file of this room that knows libp2p.

Theory. A server *provides* the model's key (a standard provider record, so that any libp2p DHT node can hold it) and
stores its signed record under a key of its own. A reader collects providers, then asks each for its record directly,
all at once and with a short deadline; who does not answer is looked up in the DHT, and if it is frozen or gone it
costs nothing but that deadline. What py-libp2p 0.8.1 does otherwise, and why this file reaches into it:

- `find_providers` answers from the local store without asking anybody, and stores what it found for a day.
- `get_value` answers from the local store first, and leaves a copy there for a day.
- one frozen node holds up an iterative lookup for 10 s: every wait here has its own deadline, after which what is known
  locally is used.
- routing tables stay empty after connecting: `add_peer` is called for every new connection.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import trio
from libp2p.abc import IHost
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.pubkey import PublicKeyValidator
from libp2p.records.validator import NamespacedValidator, Validator
from libp2p.tools.anyio_service import background_trio_service

from petals.dht.keys import NAMESPACE, parse_record_key, record_key, swarm_key
from petals.dht.records import RecordError, ServerRecord, ServerState, Verify, open_record, sign_record
from petals.protocols.errors import SwarmError
from petals.protocols.types import ModelId, PeerId

log = logging.getLogger(__name__)

WALK_S = 2.0
"""One walk towards a key. Loopback with 20 nodes takes 0.2 s; a frozen node would make it 10."""
FETCH_S = 2.5
"""One server's record, from itself or from the DHT."""
STORE_S = 5.0
"""One announcement, provider record and value together."""
MAX_PROVIDERS = 2000

FetchDirect = Callable[[PeerId, tuple[str, ...], ModelId], Awaitable[bytes | None]]


class Connected(Protocol):
    """What the directory needs of a host."""

    libp2p: IHost
    peer_id: PeerId

    def on_peer(self, callback: Callable[[PeerId], None]) -> None: ...

    def connected_peers(self) -> tuple[PeerId, ...]: ...


class Signer(Protocol):
    """What the directory needs of an identity."""

    @property
    def public_key(self) -> bytes: ...

    def sign(self, data: bytes) -> bytes: ...


class _RecordValidator(Validator):
    """Lets a peer store its own fresh, signed records under its own key, and nothing else."""

    def __init__(self, verify: Verify, clock: Callable[[], float]) -> None:
        self._verify, self._clock = verify, clock

    def validate(self, key: str, value: bytes) -> None:
        parsed = parse_record_key(key)
        if parsed is None:
            raise RecordError("no record key")
        record = open_record(value, now=self._clock(), verify=self._verify)
        if (record.model.digest, record.peer_id) != parsed:
            raise RecordError("a record under somebody else's key")

    def select(self, key: str, values: list[bytes]) -> int:
        return max(range(len(values)), key=lambda index: self._sequence(values[index]))

    def _sequence(self, value: bytes) -> int:
        try:
            return open_record(value, now=self._clock(), verify=self._verify).sequence
        except RecordError:
            return -1


class Directory:
    """What the swarm knows. Made by `open_directory`."""

    def __init__(
        self,
        dht: KadDHT,
        host: Connected,
        signer: Signer,
        verify: Verify,
        fetch_direct: FetchDirect | None,
        clock: Callable[[], float],
    ) -> None:
        self._dht = dht
        self._host = host
        self._signer = signer
        self._verify = verify
        self._fetch_direct = fetch_direct
        self._clock = clock
        self._own: dict[str, ServerRecord] = {}
        self.dropped_records = 0
        """Records that were not believed, so far."""

    async def announce(self, record: ServerRecord) -> None:
        """Sign the record, store it and provide the model's key; bounded by `STORE_S`.

        Nobody being there to store it is no error: the next peer to join asks us.
        """
        self._own[record.model.digest] = record
        data = sign_record(record, self._signer.sign, self._signer.public_key)
        with trio.move_on_after(STORE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._store, record_key(record.model, record.peer_id), data)
                if record.state is not ServerState.OFFLINE:
                    nursery.start_soon(self._provide, swarm_key(record.model))

    async def withdraw(self, record: ServerRecord) -> None:
        """Store an OFFLINE record, and stop providing."""
        self._dht.provider_store.providing_keys.discard(bytes.fromhex(swarm_key(record.model)))
        self._dht.provider_store.providers.pop(bytes.fromhex(swarm_key(record.model)), None)
        await self.announce(record)

    async def lookup(self, model: ModelId) -> tuple[ServerRecord, ...]:
        """All live servers' records of a model, one per peer; bounded by `WALK_S` + `FETCH_S`."""
        providers = await self._providers(swarm_key(model))
        found: dict[PeerId, ServerRecord] = {}

        async def fetch(info: PeerInfo) -> None:
            with trio.move_on_after(FETCH_S):
                record = await self._fetch(info, model)
                if record is not None and record.state is not ServerState.OFFLINE:
                    known = found.get(record.peer_id)
                    if known is None or known.sequence < record.sequence:
                        found[record.peer_id] = record

        async with trio.open_nursery() as nursery:
            for info in providers:
                nursery.start_soon(fetch, info)
        own = self._own.get(model.digest)  # never asked for over the network
        if own is not None and own.state is not ServerState.OFFLINE:
            found[own.peer_id] = own
        return tuple(found[peer_id] for peer_id in sorted(found))

    async def _fetch(self, info: PeerInfo, model: ModelId) -> ServerRecord | None:
        peer_id = PeerId(info.peer_id.to_base58())
        if self._fetch_direct is not None:
            try:
                with trio.move_on_after(FETCH_S * 0.6):
                    data = await self._fetch_direct(peer_id, tuple(str(addr) for addr in info.addrs), model)
                    return None if data is None else self._open(data, model, peer_id)
            except SwarmError as error:
                log.debug("no record from …%s itself: %s", peer_id[-6:], error)
                return None  # it does not answer, so it would not serve either
            return None
        key = record_key(model, peer_id)
        self._dht.value_store.remove(key.encode())  # the library would answer with this old copy
        data = await self._dht.get_value(key)
        return None if data is None else self._open(data, model, peer_id)

    def _open(self, data: bytes, model: ModelId, peer_id: PeerId) -> ServerRecord | None:
        try:
            record = open_record(data, now=self._clock(), verify=self._verify, expected_model=model)
            if record.peer_id != peer_id:
                raise RecordError("a record of another peer")
        except RecordError as error:
            self.dropped_records += 1
            log.info("dropped what …%s says: %s", peer_id[-6:], error)
            return None
        return record

    async def _providers(self, key: str) -> list[PeerInfo]:
        """Providers of a key from all nodes near it, and from our own store."""
        raw = bytes.fromhex(key)
        found: dict[ID, PeerInfo] = {info.peer_id: info for info in self._dht.provider_store.get_providers(raw)}
        found.pop(self._dht.local_peer_id, None)

        async def ask(peer: ID) -> None:
            with trio.move_on_after(WALK_S):
                try:
                    infos, _ = await self._dht.provider_store._get_providers_from_peer_with_closers(peer, raw)
                except Exception as error:  # the library raises whatever its streams raise; the node is of no use
                    log.debug("no providers from %s: %s", peer, error)
                    return
                for info in infos[:MAX_PROVIDERS]:
                    if info.peer_id != self._dht.local_peer_id and len(found) < MAX_PROVIDERS:
                        found.setdefault(info.peer_id, info)

        async with trio.open_nursery() as nursery:
            for peer in await self._closest(raw):
                nursery.start_soon(ask, peer)
        return list(found.values())

    async def _closest(self, key: bytes) -> list[ID]:
        with trio.move_on_after(WALK_S):
            return list(await self._dht.peer_routing.find_closest_peers_network(key))
        return self._dht.routing_table.find_local_closest_peers(key)

    async def _store(self, key: str, data: bytes) -> None:
        try:
            self._dht.value_store.remove(key.encode())  # put_value refuses to replace what it validates as newer
            await self._dht.put_value(key, data)
        except ValueError as error:
            log.debug("could not store %s: %s", key, error)

    async def _provide(self, key: str) -> None:
        await self._dht.provide(key)


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
    validator = NamespacedValidator(
        {"pk": PublicKeyValidator(), NAMESPACE: _RecordValidator(verify, clock)}, strict_validation=True
    )
    dht = KadDHT(
        host.libp2p,
        DHTMode.SERVER if serve_others else DHTMode.CLIENT,
        validator=validator,
        validator_changed=True,
        strict_validation=True,
    )
    tell_new_peer, new_peers = trio.open_memory_channel[PeerId](1024)

    def note(peer_id: PeerId) -> None:
        # In a burst some are missed; they are met again by walking.
        with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            tell_new_peer.send_nowait(peer_id)

    host.on_peer(note)
    async with background_trio_service(dht), trio.open_nursery() as nursery:

        async def meet() -> None:
            async for peer_id in new_peers:
                await dht.add_peer(ID.from_base58(peer_id))

        for peer_id in host.connected_peers():
            await dht.add_peer(ID.from_base58(peer_id))
        nursery.start_soon(meet)
        try:
            yield Directory(dht, host, signer, verify, fetch_direct, clock)
        finally:
            nursery.cancel_scope.cancel()
