"""The seam to libp2p: one host, its streams, and everything of the library that has to be arranged for them.

Above this file a peer is a `PeerId`, an address is a `str`, a stream is a `ByteStream`, and what goes wrong is a
`SwarmError`. Below it are py-libp2p's BasicHost (identify, ping, what KadDHT needs) and our transport.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast
from weakref import WeakKeyDictionary

import trio
from libp2p.abc import IHost, IListener, INetConn, INetStream, INetwork, INotifee
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost
from libp2p.host.exceptions import StreamFailure
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamEOF, StreamError
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from multiaddr import Multiaddr  # type: ignore[import-untyped]
from multiaddr.utils import get_network_addrs  # type: ignore[import-untyped]

from petals.peer.base.concurrency import shielded_for
from petals.peer.base.public_key import limit_library
from petals.peer.base.rate_limit import MISTAKE, Conduct
from petals.peer.net.libp2p.swarm import LibraryConn, Network, NetworkConn, library_id, share_port
from petals.peer.net.nat.traversal import Traversal
from petals.peer.net.wire.addresses import house_of, is_loopback, split_peer, tcp_endpoint
from petals.peer.net.wire.loopback import loopback_pair
from petals.peer.net.wire.multistream import Listener
from petals.peer.net.wire.muxer import MuxedStream, MuxerConfig
from petals.peer.net.wire.pnet import SwarmKey
from petals.peer.net.wire.yamux import YamuxLimits
from petals.protocols.errors import (
    PeerUnreachable,
    ProtocolViolation,
    RemoteError,
    RemoteProtocolError,
    RequestRefused,
    SwarmError,
    UserError,
)
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)
# py-libp2p warns of every peer that left, with every query. Where a program has set up no logging, Python would print
# that on stderr; with a handler that does nothing it does not, and a program that has set it up gets every record.
logging.getLogger("libp2p").addHandler(logging.NullHandler())

Handler = Callable[[ByteStream], Awaitable[None]]
"""Answers one stream. When it returns, the stream is closed; when it raises, the stream is reset and that is all."""

PING = "/ipfs/ping/1.0.0"
PING_BYTES = 32
PING_IDLE_S = 60.0
"""From one ping on a stream to the next; else a stranger's open streams would be counted for ever."""
MAX_LIBRARY_STREAMS = 16
"""Of one peer, of what py-libp2p answers: identify, its pushes, Kademlia. It reads 1 MiB of an identify push."""
MAX_LIBRARY_BYTES = 256 << 10
"""On one of them; Kademlia's own limit is the same (dht/directory.py)."""
LIBRARY_S = 30.0
"""One of them; Kademlia's own limit is shorter."""
_ADDRESS_TTL_S = 24 * 3600
_PROBE_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits between the calls on a peer that froze; it is forgotten, and may be dialled again, after the last."""
_MAX_FROZEN = 256
_MAX_NAME = 128
"""Characters of a peer ID."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """How a host listens and what it lets others do to it. Times in seconds, all positive."""

    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    """Multiaddrs; empty: a pure dialler."""
    announce: tuple[str, ...] = ()
    """What to tell others instead of what we listen on (a router's forwarded port); with or without /p2p/."""
    transport: Literal["petals", "stock"] = "petals"
    """"stock": py-libp2p's own muxer and secure channel, for comparison. docs/transport.md says what it cannot."""
    blocked: frozenset[PeerId] = frozenset()
    """Peers we do not want to be connected to, whoever dials."""
    swarm_key: SwarmKey | None = field(default=None, repr=False)
    """Only peers with the same one can connect; None: everybody who has none."""
    keep_alive_s: float = 10.0
    """A peer that says nothing for this long, asked or not, is dead."""
    connect_s: float = 5.0
    """From the first dial of a peer to a usable connection, all its addresses together."""
    handshake_s: float = 10.0
    """What a stranger may take to become a connection."""
    negotiate_s: float = 10.0
    """What a peer may take to say what a stream is for."""
    close_s: float = 1.0
    """Goodbyes."""
    max_connections: int = 512
    max_connections_per_peer: int = 4
    """Two peers that dial each other at once have two; the memory of one peer is bounded by this times the limits."""
    max_half_open: int = 128
    """Handshakes under way; one more ends the oldest, so that slow strangers cannot lock out quick ones."""
    max_handlers: int = 16384
    """Streams of all peers being answered; one more is refused."""
    max_handlers_per_peer: int = 1024
    """The same of one peer, whatever its connections allow."""
    streams_per_s: float = 128.0
    """What one peer may open for nothing, on average; who is faster is read no faster. Served work does not count, what
    breaks a rule counts 16 times."""
    streams_burst: int = 512
    """The same, at once after a rest."""
    connects_per_s: float = 32.0
    """Handshakes with one IP address, on average; more wait their turn."""
    connects_burst: int = 128
    """The same, at once after a rest."""
    limits: YamuxLimits = field(default_factory=YamuxLimits)
    """Streams, windows and bytes of one connection."""

    def __post_init__(self) -> None:
        times = (self.keep_alive_s, self.connect_s, self.handshake_s, self.negotiate_s, self.close_s)
        rates = (self.streams_per_s, self.connects_per_s)
        counts = (
            self.max_connections,
            self.max_connections_per_peer,
            self.max_half_open,
            self.max_handlers,
            self.max_handlers_per_peer,
            self.streams_burst,
            self.connects_burst,
        )
        if min(*times, *rates) <= 0 or min(counts) < 1:
            raise ValueError("times and rates must be positive and limits at least 1")
        if self.swarm_key is not None and self.transport == "stock":
            raise UserError(
                "py-libp2p's own transport has no private swarms: leave out --swarm_key or --transport stock"
            )


@asynccontextmanager
async def open_host(key_pair: KeyPair, config: HostConfig | None = None) -> AsyncIterator[Host]:
    """Run a libp2p host until the context is left; leaving takes about `close_s` at most, whatever the peers do.

    Raises:
        UserError: an address is no TCP multiaddr, or cannot be listened on.
    """
    limit_library()
    config = config or HostConfig()
    network = Network(
        key_pair,
        transport=config.transport,
        muxer=MuxerConfig(
            keep_alive_s=config.keep_alive_s,
            close_s=config.close_s,
            negotiate_s=config.negotiate_s,
            limits=config.limits,
        ),
        connect_s=config.connect_s,
        handshake_s=config.handshake_s,
        max_connections=config.max_connections,
        max_connections_per_peer=config.max_connections_per_peer,
        swarm_key=config.swarm_key,
        blocked=config.blocked,
    )
    libp2p = _BasicHost(
        network,
        # Of the addresses that others see, those of our port are asked for in peer/net/nat/traversal.py.
        disable_identify_address_discovery=True,
        negotiate_timeout=max(1, round(config.negotiate_s)),
    )
    doors = await _open_doors(config.listen)
    failure: Exception | None = None
    try:
        async with libp2p.run([]), trio.open_nursery() as nursery:
            network.nursery = nursery
            host = Host(libp2p, network, config, nursery, port=doors[0].port if doors else None)
            libp2p.own_addrs = host._own_addrs
            nursery.start_soon(host.traversal.watch)
            for door in doors:
                network.listeners[str(door.addr)] = door
                nursery.start_soon(door.serve, host._welcome)
            try:
                yield host
            except Exception as error:  # the caller's: raised below, not wrapped into the nursery's group
                failure = error
            finally:
                with trio.CancelScope(shield=True):
                    for door in doors:
                        await door.close()
                    await network.close_connections()
                nursery.cancel_scope.cancel()
    finally:
        for scope in list(libp2p._identify_tasks):  # the library leaves them to finish by themselves
            scope.cancel()
        for door in doors:
            await door.close()
    if failure is not None:
        raise failure


class Host:
    """One peer's place in the network. Made by `open_host`."""

    def __init__(
        self, libp2p: BasicHost, network: Network, config: HostConfig, nursery: trio.Nursery, port: int | None
    ) -> None:
        self.libp2p: IHost = libp2p
        """For dht/directory.py only."""
        self.peer_id = PeerId(str(libp2p.get_id()))
        self._multiselect = libp2p.multiselect
        self._network, self._config, self._nursery = network, config, nursery
        self._handlers: dict[str, Handler] = {}
        self._n_handlers: Counter[PeerId] = Counter()
        self._n_library: Counter[PeerId] = Counter()
        self._half_open: dict[trio.CancelScope, None] = {}
        self._frozen: dict[PeerId, None] = {}
        self._on_peer: list[Callable[[PeerId], None]] = []
        self._introduction: tuple[frozenset[str], Callable[[PeerId], Awaitable[None]]] | None = None
        self._introduced: WeakKeyDictionary[NetworkConn, _Introduced] = WeakKeyDictionary()
        self._streams = Conduct[PeerId](config.streams_per_s, config.streams_burst, trio.current_time)
        self._knocks = Conduct[str](config.connects_per_s, config.connects_burst, trio.current_time)
        network.on_stream = self._take_stream
        network.pace = self._streams.charge
        network.is_frozen = lambda peer_id: PeerId(str(peer_id)) in self._frozen
        network.on_frozen = self._note_frozen
        network.register_notifee(_Notifee(self._note_connected))
        self.set_handler(PING, _answer_ping)
        self.traversal = Traversal(network, self, nursery, port)
        """Ways around routers."""
        self.port = port
        """Of the first address listened on."""
        self.reach = "unknown"
        """How others reach this peer, as peer/membership/reachability.py has found."""

    # -- who and where ---------------------------------------------------------------------------------------------

    @property
    def addrs(self) -> tuple[str, ...]:
        """Where others reach this host: full multiaddrs with /p2p/, wildcards expanded, ports resolved."""
        return tuple(str(addr) for addr in self.libp2p.get_addrs())

    @property
    def listens_outside(self) -> bool:
        """Whether an address that is listened on can be reached from other machines, routers aside."""
        return any(not is_loopback(addr) for addr in self.libp2p.get_transport_addrs())

    def _own_addrs(self) -> list[Multiaddr]:
        """Without /p2p/<this peer>."""
        said = [split_peer(addr)[0] for addr in self._config.announce]
        ways = [Multiaddr(addr) for addr in self.traversal.addrs]
        return [*(said or self.libp2p.get_transport_addrs()), *ways]

    def connected_peers(self) -> tuple[PeerId, ...]:
        return tuple(PeerId(str(peer_id)) for peer_id in self._network.connections if self._network.live_conn(peer_id))

    def is_connected(self, peer_id: PeerId) -> bool:
        return self._network.live_conn(ID.from_base58(peer_id)) is not None

    def link(self, peer_id: PeerId) -> str:
        """How we are connected with a peer: "direct", "punched" or "relayed"; "" when we are not, or are it."""
        return self.traversal.link(peer_id)

    def on_peer(self, callback: Callable[[PeerId], None]) -> None:
        """Call `callback` with every peer that gets connected from now on, whoever dialled. It must not block."""
        self._on_peer.append(callback)

    def introduce(self, protocols: Collection[str], introduce: Callable[[PeerId], Awaitable[None]]) -> None:
        """Await `introduce(peer)` once per connection, before we open the first stream of one of `protocols` on it.
        What it raises is raised there, and it is asked again the next time."""
        self._introduction = frozenset(protocols), introduce

    # -- connections -----------------------------------------------------------------------------------------------

    async def connect(self, addr: str) -> PeerId:
        """Connect to a full address, /ip4/.../tcp/.../p2p/<peer id>.

        Raises:
            UserError: it is no such address.
            PeerUnreachable: nobody, or somebody else, answered there within `connect_s`.
        """
        try:
            _, claimed = split_peer(addr)
        except ValueError:
            claimed = None
        if claimed is None:
            raise UserError(f"{addr} is no full address: /ip4/<ip>/tcp/<port>/p2p/<peer id>")
        self.trust([addr])
        peer_id = PeerId(str(claimed))
        await self.connect_peer(peer_id, [addr])
        return peer_id

    def trust(self, addrs: Sequence[str]) -> None:
        """The user gave these addresses: they are dialled whatever their network, and however often."""
        self._network.policy.trust(addrs)

    def plausible(self, namer: PeerId, addrs: Sequence[str]) -> tuple[str, ...]:
        """Those of other peers' addresses that `namer` may name (peer/net/wire/dial_policy.py)."""
        try:
            ip = self._network.ip_of_peer(library_id(namer))
        except ValueError:
            ip = None
        return tuple(self._network.policy.plausible(addrs, ip))

    async def connect_peer(self, peer_id: PeerId, addrs: Sequence[str]) -> None:
        """Be connected to `peer_id`; at once when we are. `addrs` are raced, together with those already known.

        Raises:
            PeerUnreachable: no address answered within `connect_s`, or the peer froze and has not come back.
        """
        await self._connect(peer_id, addrs)

    async def disconnect(self, peer_id: PeerId) -> None:
        """Say goodbye and close. Nothing happens when there is no connection."""
        await self._network.close_peer(ID.from_base58(peer_id))

    async def _connect(self, peer_id: PeerId, addrs: Sequence[str]) -> NetworkConn:
        target = _id_of(peer_id)
        if (conn := self._network.live_conn(target)) is not None:
            await trio.lowlevel.checkpoint()
            return conn
        if peer_id == self.peer_id:
            raise PeerUnreachable("that is this peer itself", peer_id)
        try:
            return await self._network.dial(target, self._known_addrs(target, addrs))
        except SwarmException as error:
            raise PeerUnreachable(f"cannot reach {peer_id}: {error}", peer_id) from None

    def _known_addrs(self, peer_id: ID, addrs: Sequence[str]) -> list[Multiaddr]:
        """`addrs` first, then what the peerstore knows; new ones are remembered there."""
        given: dict[str, Multiaddr] = {}
        for addr in addrs:
            try:
                parsed, _ = split_peer(addr)
            except ValueError as error:  # a record may say anything
                log.debug("address of %s: %s", peer_id, error)
                continue
            given[str(parsed)] = parsed
        peerstore = self.libp2p.get_peerstore()
        if given:
            peerstore.add_addrs(peer_id, list(given.values()), _ADDRESS_TTL_S)
        try:
            known = peerstore.addrs(peer_id)
        except (BaseLibp2pError, PeerStoreError):
            known = []
        return list(given.values()) + [addr for addr in known if str(addr) not in given]

    # -- streams ---------------------------------------------------------------------------------------------------

    async def open_stream(self, peer_id: PeerId, protocol: str, *, addrs: Sequence[str] = ()) -> ByteStream:
        """A stream to `peer_id` on which both ends speak `protocol`; connects first if need be.

        The first stream of a protocol on a connection waits for the peer's word, which is a round trip; the next ones
        take it for granted and check it with the first read.

        Raises:
            PeerUnreachable: no connection, or it broke.
            RequestRefused: the peer does not speak `protocol`.
            RemoteProtocolError: the peer speaks nonsense.
        """
        if peer_id == self.peer_id:
            return await self._open_loopback(protocol)
        conn = await self._connect(peer_id, addrs)
        if self._introduction is not None and protocol in self._introduction[0]:
            introduced = self._introduced.setdefault(conn, _Introduced())
            async with introduced.lock:
                if not introduced.done:
                    await self._introduction[1](peer_id)
                    introduced.done = True
        return await self.open_stream_on(conn, protocol)

    async def open_stream_on(self, conn: NetworkConn, protocol: str) -> ByteStream:
        """A stream of one connection in particular. Raises as `open_stream` does."""
        peer_id = PeerId(str(conn.muxed_conn.peer_id))
        with _deadline(self._config.negotiate_s, f"{protocol} was not agreed on", peer_id):
            if not isinstance(conn.muxed_conn, LibraryConn):
                return await self._open_stock_stream(peer_id, protocol)
            connection = conn.muxed_conn.connection
            stream = connection.open_stream()
            try:
                await stream.propose(protocol)
                if protocol not in connection.confirmed:
                    await stream.confirm()
            except BaseException:
                stream.reset_nowait()
                raise
            return stream

    def has_better_way(self, stream: ByteStream) -> bool:
        """Whether a stream opened now would take a better connection than `stream` has: one without a relay, or a
        circuit that the relay will not cut soon."""
        if not isinstance(stream, MuxedStream):
            return False
        target = library_id(stream.remote_peer)
        best = self._network.live_conn(target)
        own = self._network.conn_of(target, stream.connection)
        return best is not None and own is not None and best.rank() < own.rank()

    async def _open_loopback(self, protocol: str) -> ByteStream:
        """A stream to ourselves: a peer that serves and asks is its own cheapest server."""
        await trio.lowlevel.checkpoint()
        handler = self._handlers.get(protocol)
        if handler is None:
            raise RequestRefused(f"this peer does not speak {protocol}", self.peer_id)
        return self.loop_back(self.peer_id, protocol, handler)

    def loop_back(self, name: PeerId, protocol: str, handler: Handler) -> ByteStream:
        """A stream to a handler of our own, which nobody else can reach; `name` is its remote peer."""
        near, far = loopback_pair(self.peer_id, name)
        self._nursery.start_soon(self._run_handler, protocol, far, handler)
        return near

    def set_handler(self, protocol: str, handler: Handler) -> None:
        """Answer streams of `protocol` with `handler`, from now on."""
        self._handlers[protocol] = handler
        # The library's table too: identify reads the names from it, and the stock stack calls from it.
        self.libp2p.set_stream_handler(TProtocol(protocol), partial(self._answer_library_stream, protocol))

    def remove_handler(self, protocol: str) -> None:
        """Refuse new streams of `protocol`; those being answered go on."""
        self._handlers.pop(protocol, None)
        self.libp2p.remove_stream_handler(TProtocol(protocol))

    def charge(self, peer_id: PeerId, streams: int) -> None:
        """Count so many streams against a peer, as if it had opened them; or, if negative, in its favour."""
        self._streams.charge(peer_id, streams)

    async def ping(self, peer_id: PeerId) -> float:
        """One round trip to a connected or known peer, in seconds. Raises as `open_stream` does."""
        stream = await self.open_stream(peer_id, PING)
        try:
            if isinstance(stream, MuxedStream):
                await stream.confirm()
            payload = secrets.token_bytes(PING_BYTES)
            started = trio.current_time()
            with _deadline(self._config.keep_alive_s, "no answer to a ping", peer_id):
                await stream.write(payload)
                answer = await MessageStream(stream, max_message_bytes=PING_BYTES).read_exactly(PING_BYTES)
            if answer != payload:
                raise RemoteProtocolError("answer to a ping is not the ping", peer_id)
            elapsed = trio.current_time() - started
            await stream.close()
            return elapsed
        except BaseException:
            await self._reset(stream)
            raise

    # -- answering -------------------------------------------------------------------------------------------------

    def _take_stream(self, conn: NetworkConn, stream: MuxedStream) -> None:
        """A peer opened `stream`. Called from the connection's reader, so only starts a task."""
        of_peer = self._n_handlers[stream.remote_peer]
        if of_peer >= self._config.max_handlers_per_peer or self._n_handlers.total() >= self._config.max_handlers:
            stream.reset_nowait()
            return
        self._n_handlers[stream.remote_peer] = of_peer + 1
        self._nursery.start_soon(self._answer, conn, stream)

    async def _answer(self, conn: NetworkConn, stream: MuxedStream) -> None:
        try:
            protocol = await self._negotiate(stream)
            if protocol is None:
                return
            handler = self._handlers.get(protocol)
            if handler is not None:
                await self._run_handler(protocol, stream, handler)
            else:
                await self._run_library_handler(conn, protocol, stream)
        finally:
            self._n_handlers[stream.remote_peer] -= 1
            if not self._n_handlers[stream.remote_peer]:
                del self._n_handlers[stream.remote_peer]

    async def _negotiate(self, stream: MuxedStream) -> str | None:
        try:
            with trio.fail_after(self._config.negotiate_s):
                return await stream.answer(Listener(cast("dict[str, object]", self._multiselect.handlers)))
        except (RemoteError, ProtocolViolation, trio.TooSlowError, trio.ClosedResourceError) as error:
            log.debug("stream of %s came to nothing: %r", stream.remote_peer, error)
            stream.reset_nowait()
            if isinstance(error, ProtocolViolation):
                self.charge(stream.remote_peer, MISTAKE)
            return None

    async def _run_handler(self, protocol: str, stream: ByteStream, handler: Handler) -> None:
        """The one place where any exception is caught: a crash costs one stream, not the node."""
        try:
            await handler(stream)
            await stream.close()
            return
        except SwarmError as error:
            log.debug("%s with …%s ended: %s", protocol, stream.remote_peer[-6:], error)
            if isinstance(error, ProtocolViolation) or (
                isinstance(error, RemoteProtocolError) and error.peer_id == stream.remote_peer
            ):
                self.charge(stream.remote_peer, MISTAKE)
        except Exception:
            log.exception("%s with %s failed; its stream is reset", protocol, stream.remote_peer)
        except BaseException:  # the host is leaving
            await self._reset(stream)
            raise
        await self._reset(stream)

    async def _reset(self, stream: ByteStream) -> None:
        with shielded_for(self._config.close_s):
            await stream.reset()

    async def _run_library_handler(self, conn: NetworkConn, protocol: str, stream: MuxedStream) -> None:
        """Identify, Kademlia, relay: what the library answers. Its handlers close their streams themselves."""
        handler = self._multiselect.handlers.get(TProtocol(protocol))
        if handler is None:
            stream.reset_nowait()
            return
        if self._n_library[stream.remote_peer] >= MAX_LIBRARY_STREAMS:
            stream.reset_nowait()
            return
        self._n_library[stream.remote_peer] += 1
        net_stream = self._network.library_stream(conn, stream, TProtocol(protocol), MAX_LIBRARY_BYTES)
        try:
            with trio.move_on_after(LIBRARY_S) as scope:
                await handler(net_stream)
            if scope.cancelled_caught:
                stream.reset_nowait()
            else:
                stream.close_nowait()
        except Exception as error:
            log.debug("%s of %s failed: %r", protocol, stream.remote_peer, error)
            stream.reset_nowait()
            if isinstance(error, ProtocolViolation):
                self.charge(stream.remote_peer, MISTAKE)
        finally:
            self._n_library[stream.remote_peer] -= 1
            self._n_library += Counter()  # forgets zeros
            conn.remove_stream(net_stream)

    # -- the stock stack -------------------------------------------------------------------------------------------

    async def _open_stock_stream(self, peer_id: PeerId, protocol: str) -> ByteStream:
        try:
            return StockStream(await self.libp2p.new_stream(ID.from_base58(peer_id), [TProtocol(protocol)]))
        except StreamFailure as error:
            if "not supported" in str(error.__cause__):
                raise RequestRefused(f"peer does not speak {protocol}", peer_id) from None
            raise PeerUnreachable(str(error), peer_id) from None
        except BaseLibp2pError as error:
            raise PeerUnreachable(str(error), peer_id) from None

    async def _answer_library_stream(self, protocol: str, net_stream: INetStream) -> None:
        handler = self._handlers.get(protocol)
        if handler is not None:
            await self._run_handler(protocol, StockStream(net_stream), handler)

    # -- listening -------------------------------------------------------------------------------------------------

    async def _welcome(self, stream: trio.SocketStream, addr: Multiaddr) -> None:
        if len(self._half_open) >= self._config.max_half_open:
            next(iter(self._half_open)).cancel()
        scope = trio.CancelScope()
        self._half_open[scope] = None
        try:
            with scope:
                try:
                    await trio.sleep(self._knocks.charge(_house_of(stream)))
                except trio.Cancelled:
                    await trio.aclose_forcefully(stream)
                    raise
                await self._network.accept(stream, addr)
        finally:
            del self._half_open[scope]

    # -- comings and goings ----------------------------------------------------------------------------------------

    def _note_connected(self, conn: INetConn) -> None:
        peer_id = PeerId(str(conn.muxed_conn.peer_id))
        self._frozen.pop(peer_id, None)
        for callback in self._on_peer:
            callback(peer_id)

    def _note_frozen(self, peer: ID) -> None:
        peer_id = PeerId(str(peer))
        log.info("peer %s has stopped answering", peer_id)
        if peer_id not in self._frozen:
            if len(self._frozen) >= _MAX_FROZEN:
                self._frozen.pop(next(iter(self._frozen)))
            self._frozen[peer_id] = None
            self._nursery.start_soon(self._probe, peer)

    async def _probe(self, peer_id: ID) -> None:
        """Call on a frozen peer until it answers. Its kernel accepts for it, so that every caller who dialled it
        meanwhile would wait `connect_s` for nothing; they are told so at once instead."""
        name = PeerId(str(peer_id))
        for wait_s in _PROBE_S:
            await trio.sleep(wait_s)
            if name not in self._frozen:
                return
            try:
                await self._network.race(peer_id, self._known_addrs(peer_id, ()))
                return  # _note_connected has cleared it
            except SwarmException as error:
                log.debug("%s is still silent: %s", name, error)
                if "no answer" not in str(error):
                    break  # refused: it is not frozen, it is gone
        self._frozen.pop(name, None)


class _BasicHost(BasicHost):
    """The library's (0.8.1) takes the first /p2p/ of an address off, which in a way through a relay is the relay's."""

    own_addrs: Callable[[], list[Multiaddr]] = list

    def get_addrs(self) -> list[Multiaddr]:
        me = Multiaddr(f"/p2p/{self.get_id()}")
        return [addr.encapsulate(me) for addr in self.own_addrs()]


@dataclass(eq=False)
class _Introduced:
    """Whether a connection's other end knows why it should serve us."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    done: bool = False


class StockStream:
    """A stream of py-libp2p's own stack as a ByteStream, as far as it can be one (docs/transport.md)."""

    def __init__(self, stream: INetStream) -> None:
        self._stream = stream
        self._at_end = False

    @property
    def remote_peer(self) -> PeerId:
        return PeerId(str(self._stream.muxed_conn.peer_id))

    async def read(self, max_bytes: int) -> bytes:
        if self._at_end:
            await trio.lowlevel.checkpoint()
            return b""
        try:
            return await self._stream.read(max_bytes)
        except StreamEOF:
            self._at_end = True
            return b""
        except (StreamError, BaseLibp2pError) as error:
            raise PeerUnreachable(f"stream broke: {error or type(error).__name__}", self.remote_peer) from None

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._stream.write(bytes(data))
        except trio.Cancelled:
            with shielded_for(1):
                await self.reset()
            raise
        except (StreamError, BaseLibp2pError) as error:
            raise PeerUnreachable(f"stream broke: {error or type(error).__name__}", self.remote_peer) from None

    async def close_write(self) -> None:
        await self._close(cast(NetStream, self._stream).close_write)

    async def close(self) -> None:
        await self._close(self._stream.close)

    async def reset(self) -> None:
        await self._close(self._stream.reset)

    async def _close(self, how: Callable[[], Awaitable[None]]) -> None:
        try:
            await how()
        except (StreamError, BaseLibp2pError) as error:
            log.debug("closing a stock stream: %r", error)


async def _answer_ping(stream: ByteStream) -> None:
    """32 bytes come, the same 32 bytes go back, until the peer has had enough, or is silent."""
    payload = bytearray()
    with trio.move_on_after(PING_IDLE_S) as scope:
        while piece := await stream.read(PING_BYTES - len(payload)):
            payload += piece
            if len(payload) == PING_BYTES:
                await stream.write(payload)
                payload = bytearray()
                scope.deadline = trio.current_time() + PING_IDLE_S


def _house_of(stream: trio.SocketStream) -> str:
    """Where a stranger calls from: an IP address, or of version 6 its network, since everybody has many of those."""
    try:
        host: str = stream.socket.getpeername()[0].partition("%")[0]  # a link-local one names its interface
    except OSError:
        return ""  # gone already
    return house_of(host)


def _id_of(peer_id: PeerId) -> ID:
    """The library's form of a name. Raises PeerUnreachable when it is none: a push may name anything as its goal."""
    try:
        if 0 < len(peer_id) <= _MAX_NAME:  # decoding base58 takes the square of its length
            return ID.from_base58(peer_id)
    except ValueError:
        pass
    raise PeerUnreachable(f"{peer_id[:_MAX_NAME]!r} is no peer ID", peer_id)


class _deadline:
    """`trio.fail_after` that names the peer."""

    def __init__(self, seconds: float, what: str, peer_id: PeerId) -> None:
        self._scope = trio.CancelScope()
        self._seconds, self._what, self._peer_id = seconds, what, peer_id

    def __enter__(self) -> None:
        self._scope.deadline = trio.current_time() + self._seconds
        self._scope.__enter__()

    def __exit__(self, kind: object, value: BaseException | None, traceback: object) -> bool | None:
        swallowed = self._scope.__exit__(type(value) if value else None, value, value.__traceback__ if value else None)
        if self._scope.cancelled_caught:
            raise PeerUnreachable(f"{self._what} within {self._seconds:g} s", self._peer_id)
        return swallowed


class _Notifee(INotifee):
    def __init__(self, connected: Callable[[INetConn], None]) -> None:
        self._connected = connected

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        self._connected(conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None: ...

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None: ...

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None: ...


class _Door(IListener):
    """One address listened on; the library asks it where that is."""

    def __init__(self, addr: Multiaddr, listener: trio.SocketListener) -> None:
        self.addr = addr
        self._listener = listener
        self.port: int = listener.socket.getsockname()[1]
        share_port(listener.socket)  # with our own dials, which routers then let answers in for

    async def serve(self, welcome: Callable[[trio.SocketStream, Multiaddr], Awaitable[None]]) -> None:
        """Accept until cancelled. Not `trio.serve_listeners`: that closes a socket when its handler returns, and ours
        outlive the handshake."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    stream = await self._listener.accept()
                except trio.ClosedResourceError:
                    return  # the host is leaving; handshakes under way are bounded
                except OSError as error:  # out of descriptors, as a rule; the waiting peers wait on
                    log.warning("cannot accept connections at %s: %s", self.addr, error)
                    await trio.sleep(0.1)
                    continue
                nursery.start_soon(welcome, stream, self.addr)

    async def listen(self, maddr: Multiaddr) -> None:
        raise NotImplementedError("a door is opened by open_host")

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        family, ip = next((part.name, str(value)) for part, value in self.addr.items())
        wildcards = {"0.0.0.0": (4, "127.0.0.1"), "::": (6, "::1")}
        if ip not in wildcards:
            return (Multiaddr(f"/{family}/{ip}/tcp/{self.port}"),)
        version, loopback = wildcards[ip]
        # The loopback address last: only peers on this machine can use it, but those can.
        ips = [*(ip for ip in get_network_addrs(version) if ip != loopback), loopback]
        return tuple(Multiaddr(f"/{family}/{ip}/tcp/{self.port}") for ip in ips)

    async def close(self) -> None:
        await self._listener.aclose()


async def _open_doors(addrs: Sequence[str]) -> list[_Door]:
    """All or none of them. Raises as `_open_door` does."""
    doors: list[_Door] = []
    try:
        for addr in addrs:
            doors.append(await _open_door(addr))
    except BaseException:
        for door in doors:
            await door.close()
        raise
    return doors


def parse_listen(addr: str) -> tuple[Multiaddr, str, int]:
    """An address to listen on, and its IP and port.

    Raises:
        UserError: it is no TCP multiaddr.
    """
    try:
        parsed = Multiaddr(addr)
        return parsed, *tcp_endpoint(parsed)
    except Exception:  # multiaddr raises half a dozen unrelated kinds
        form = "/ip4/<ip>/tcp/<port>, such as /ip4/0.0.0.0/tcp/31337"
        raise UserError(f"cannot listen on {addr}: not of the form {form}") from None


async def _open_door(addr: str) -> _Door:
    """Bind and listen.

    Raises:
        UserError: `addr` is no TCP multiaddr, or the port is in use or not ours to use.
    """
    parsed, ip, port = parse_listen(addr)
    try:
        (listener,) = await trio.open_tcp_listeners(port, host=ip)
    except OSError as error:
        reason = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise UserError(f"cannot listen on {addr}: {reason.strerror or reason}") from None
    return _Door(parsed, listener)
