"""Ways to a peer behind a router: circuits through relays, holes punched, and what others see of us.

This file joins the protocols (circuit.py, relay.py, dcutr.py, autonat.py) to the network. Which of them to use, and
when, is decided in peer/membership/reachability.py.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IHost
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.peer.base.config import RelayLimits
from petals.peer.net.libp2p.swarm import LibraryConn, Network, NetworkConn, library_id
from petals.peer.net.nat import autonat, dcutr
from petals.peer.net.nat.relay import Relay
from petals.peer.net.wire import circuit
from petals.peer.net.wire.addresses import Circuit, house_of, ip_of, is_loopback, parse_addrs, split_peer, tcp_endpoint
from petals.peer.net.wire.dial_policy import Reach, reach_of
from petals.protocols.errors import PeerUnreachable, ProtocolViolation, RemoteError, RequestRefused, SwarmError
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

IDENTIFY = "/ipfs/id/1.0.0"
MAX_IDENTIFY_BYTES = 64 << 10
ASK_S = 10.0
"""One question to another peer, its dialling us back included."""
PUNCH_S = 5.0
"""One attempt to meet; a lost SYN is sent again after a second."""
PUNCHES = 3
LINGER_S = 3.0
"""Between two looks at the circuits."""
MAX_DIAL_BACKS = 16
MAX_DIAL_BACK_ADDRS = 4

Handler = Callable[[ByteStream], Awaitable[None]]


class Streams(Protocol):
    """What is needed of the host."""

    libp2p: IHost
    peer_id: PeerId

    def set_handler(self, protocol: str, handler: Handler) -> None: ...

    async def open_stream(self, peer_id: PeerId, protocol: str, *, addrs: Sequence[str] = ()) -> ByteStream: ...

    async def open_stream_on(self, conn: NetworkConn, protocol: str) -> ByteStream: ...


class _Identity(NamedTuple):
    """What a peer says of us and of itself."""

    observed: Multiaddr | None
    listens: tuple[Multiaddr, ...]


class Traversal:
    """One host's ways around routers.

    Attributes:
        extra_addrs: told to others besides the addresses listened on: mapped ones.
        relay: what this peer does for others; None: nothing.
    """

    def __init__(self, network: Network, streams: Streams, nursery: trio.Nursery, port: int | None) -> None:
        self.extra_addrs: tuple[str, ...] = ()
        self.relay: Relay | None = None
        self._network, self._streams, self._nursery, self._port = network, streams, nursery, port
        self._places: dict[PeerId, tuple[str, ...]] = {}
        self._seen_by: dict[PeerId, tuple[str, NetworkConn]] = {}
        self._punched: set[PeerId] = set()
        self._upgrading: set[PeerId] = set()
        self._dial_backs: set[PeerId] = set()
        network.open_circuit = self._open_circuit
        network.is_wanted = self._has_place
        streams.set_handler(circuit.STOP, self._answer_stop)
        streams.set_handler(dcutr.DCUTR, self._answer_dcutr)
        streams.set_handler(autonat.AUTONAT, self._answer_autonat)

    # -- what others are told ----------------------------------------------------------------------------------------

    @property
    def addrs(self) -> tuple[str, ...]:
        """Besides those listened on: mapped ones, and ways through relays. Without /p2p/<this peer>."""
        circuits = [f"{addr}/p2p-circuit" for addrs in self._places.values() for addr in addrs]
        return (*self.extra_addrs, *circuits)

    @property
    def seen_at(self) -> tuple[str, ...]:
        """Where relays see our listening port: what a router makes of it."""
        self._seen_by = {peer: (addr, conn) for peer, (addr, conn) in self._seen_by.items() if not conn.is_closed}
        return tuple(dict.fromkeys(addr for addr, _ in self._seen_by.values()))

    def link(self, peer_id: PeerId) -> str:
        """How we are connected: "direct", "punched", "relayed"; "" when we are not."""
        conn = self._network.live_conn(library_id(peer_id))
        if conn is None:
            return ""
        return "relayed" if conn.is_relayed else "punched" if peer_id in self._punched else "direct"

    # -- a place at a relay --------------------------------------------------------------------------------------------

    async def reserve(self, relay: PeerId, addrs: Sequence[str] = ()) -> float:
        """Take, or renew, a place at a relay; from then on our addresses name it.

        Returns: for how many seconds it holds.
        Raises:
            RequestRefused: it is none, or has no room. PeerUnreachable, RemoteProtocolError.
        """
        with _within(ASK_S, relay):
            reserved = await circuit.reserve(await self._streams.open_stream(relay, circuit.HOP, addrs=addrs))
        if relay not in self._places:
            with suppress(SwarmError):
                await self.see(relay)
        known = [addr for addr in reserved.addrs if _is_direct(addr)] or [
            f"{addr.partition('/p2p/')[0]}/p2p/{relay}" for addr in addrs
        ]
        # A relay names its loopback addresses, too; they help only where we met it there.
        outside = [addr for addr in known if not is_loopback(Multiaddr(addr))]
        self._places[relay] = tuple(outside or known)
        return circuit.expires_in(reserved)

    def leave(self, relay: PeerId) -> None:
        """Name a relay no longer."""
        self._places.pop(relay, None)

    async def see(self, relay: PeerId) -> str:
        """Where `relay` sees our listening port. The connection stays: it keeps the router's door open.

        Raises:
            PeerUnreachable: it can not say.
        """
        target = ID.from_base58(relay)
        known, conn = self._seen_by.get(relay, ("", None))
        if conn is not None and not conn.is_closed:
            return known
        conn = self._network.live_conn(target)
        if self._port is None or conn is None or not isinstance(conn.muxed_conn, LibraryConn):
            raise PeerUnreachable("there is no port to be seen", relay)
        endpoint = conn.muxed_conn.remote_endpoint
        if endpoint is None:
            raise PeerUnreachable("a relay behind a relay", relay)
        family = "ip6" if ":" in endpoint[0] else "ip4"
        try:
            addr = Multiaddr(f"/{family}/{endpoint[0]}/tcp/{endpoint[1]}")
            conn = await self._network.dial_from_port(target, addr, self._port)
        except SwarmException as error:
            raise PeerUnreachable(str(error), relay) from None
        observed = (await self._identify(conn)).observed
        if observed is None:
            raise PeerUnreachable("it does not say where it sees us", relay)
        self._seen_by[relay] = (str(observed), conn)
        return str(observed)

    async def _identify(self, conn: NetworkConn) -> _Identity:
        peer_id = PeerId(str(conn.muxed_conn.peer_id))
        with _within(ASK_S, peer_id):
            stream = await self._streams.open_stream_on(conn, IDENTIFY)
            data = await MessageStream(stream, max_message_bytes=MAX_IDENTIFY_BYTES).read_message()
            await stream.close()
        try:
            message = Identify.FromString(data or b"")
        except DecodeError:
            raise PeerUnreachable("an identity that does not decode", peer_id) from None
        observed = parse_addrs([message.observed_addr] if message.observed_addr else [])
        return _Identity(observed[0] if observed else None, parse_addrs(message.listen_addrs[:MAX_DIAL_BACK_ADDRS]))

    # -- being dialled back --------------------------------------------------------------------------------------------

    async def ask_dial_back(self, peer_id: PeerId, addrs: Sequence[str]) -> bool:
        """Whether `peer_id` can dial one of our `addrs`.

        Raises:
            RequestRefused: it does not do that. PeerUnreachable, RemoteProtocolError.
        """
        with _within(ASK_S, peer_id):
            stream = await self._streams.open_stream(peer_id, autonat.AUTONAT)
            return await autonat.ask(stream, self._streams.peer_id, addrs)

    async def _answer_autonat(self, stream: ByteStream) -> None:
        """Dial the asker back, at the IP address that it comes from and no other: nobody dials third parties for us."""
        messages = MessageStream(stream, max_message_bytes=autonat.MAX_MESSAGE_BYTES)
        peer_id = stream.remote_peer
        with trio.move_on_after(ASK_S):
            addrs = await autonat.read_question(messages)
            conn = self._network.live_conn(ID.from_base58(peer_id))
            endpoint = conn.muxed_conn.remote_endpoint if conn and isinstance(conn.muxed_conn, LibraryConn) else None
            if endpoint is None or peer_id in self._dial_backs or len(self._dial_backs) >= MAX_DIAL_BACKS:
                await autonat.write_answer(messages, None)
                return
            if not self._network.policy.may_dial_back(endpoint[0]):
                await autonat.write_answer(messages, None)
                return
            self._dial_backs.add(peer_id)
            try:
                allowed = [addr for addr in addrs if ip_of(addr) == endpoint[0]][:MAX_DIAL_BACK_ADDRS]
                reached = None
                for addr in allowed:
                    if await self._network.answers_at(ID.from_base58(peer_id), addr):
                        reached = addr
                        break
            finally:
                self._dial_backs.discard(peer_id)
            await autonat.write_answer(messages, reached)

    # -- circuits ------------------------------------------------------------------------------------------------------

    async def _open_circuit(self, way: Circuit, target: ID, addr: Multiaddr) -> circuit.CircuitConn:
        relay = PeerId(str(way.relay))
        try:
            stream = await self._streams.open_stream(relay, circuit.HOP, addrs=[str(way.relay_addr)])
            return await circuit.connect(stream, target, addr)
        except RemoteError as error:
            raise SwarmException(str(error)) from None

    async def _answer_stop(self, stream: ByteStream) -> None:
        """A relay says that somebody calls. The stream carries the connection until that ends."""
        relay = stream.remote_peer
        if relay not in self._places:
            raise RequestRefused("no place was taken at that relay", relay)
        addr = Multiaddr(f"{self._places[relay][0]}/p2p-circuit")
        with _within(ASK_S, relay):
            called = await circuit.accept(stream, addr)
        try:
            conn = await self._network.accept_circuit(called)
        except SwarmException as error:
            raise PeerUnreachable(f"a call through a relay came to nothing: {error}", relay) from None
        assert isinstance(conn.muxed_conn, LibraryConn)
        self._nursery.start_soon(self._upgrade_to_direct, conn)
        await conn.muxed_conn.connection.closed.wait()

    async def watch(self) -> None:
        """Close circuits that nobody uses any more, and renew in time those that a relay will cut."""
        while True:
            await trio.sleep(LINGER_S)
            for conns in list(self._network.connections.values()):
                for conn in [conn for conn in conns if isinstance(conn, NetworkConn) and conn.is_relayed]:
                    await self._look_at(conn)

    async def _look_at(self, conn: NetworkConn) -> None:
        target = conn.muxed_conn.peer_id
        best = self._network.live_conn(target)
        assert conn.circuit is not None
        assert isinstance(conn.muxed_conn, LibraryConn)
        if best is not conn and best is not None:
            if not conn.muxed_conn.connection.session.streams:
                await conn.close()
        elif conn.circuit.is_fading and conn.circuit.is_initiator:
            try:
                await self._network.race(target, conn.circuit.get_transport_addresses())
            except SwarmException as error:
                log.info("no second circuit to …%s: %s", str(target)[-6:], error)

    # -- from a circuit to a connection --------------------------------------------------------------------------------

    async def _upgrade_to_direct(self, conn: NetworkConn) -> None:
        """We were called through a relay: look for a way without. Never raises."""
        target = conn.muxed_conn.peer_id
        peer_id = PeerId(str(target))
        if peer_id in self._upgrading:
            return
        if not self._network.policy.may_punch(peer_id):
            log.info("the circuit with …%s stays: it has asked for too many connections", peer_id[-6:])
            return
        self._upgrading.add(peer_id)
        try:
            theirs = (await self._identify(conn)).listens
            if await self._dial_plainly(target, theirs):
                return
            for _ in range(PUNCHES):
                if self._port is None or self._network.has_direct(target) or conn.is_closed:
                    return
                await self._punch(conn, target)
            if not self._network.has_direct(target):
                log.info("the circuit with …%s stays: neither end's router lets the other in", peer_id[-6:])
        except SwarmError as error:
            log.info("the circuit with …%s stays: %s", peer_id[-6:], error)
        finally:
            self._upgrading.discard(peer_id)

    async def _dial_plainly(self, target: ID, addrs: Sequence[Multiaddr]) -> bool:
        """The caller may be within reach by itself."""
        plain = []
        for addr in self._network.policy.plausible([str(each) for each in addrs], self._network.ip_of_peer(target)):
            with suppress(SwarmException, ValueError):
                bare, _ = split_peer(addr)
                tcp_endpoint(bare)
                if not is_loopback(bare):
                    plain.append(bare)
        with trio.move_on_after(PUNCH_S), suppress(SwarmException):
            await self._network.race(target, plain)
        return self._network.has_direct(target)

    async def _punch(self, conn: NetworkConn, target: ID) -> None:
        assert self._port is not None
        with _within(ASK_S, PeerId(str(target))):
            messages = MessageStream(
                await self._streams.open_stream_on(conn, dcutr.DCUTR), max_message_bytes=dcutr.MAX_MESSAGE_BYTES
            )
            offer = await dcutr.begin(messages, self.seen_at)
            await messages.close()
        log.debug("we are seen at %s, they at %s", self.seen_at, offer.addrs)
        await trio.sleep(offer.round_trip_s / 2)
        theirs = self._said(offer.addrs, conn)
        if await self._network.punch(target, theirs, self._port, is_client=False, within_s=PUNCH_S):
            self._punched.add(PeerId(str(target)))

    def _said(self, addrs: Sequence[Multiaddr], conn: NetworkConn) -> list[Multiaddr]:
        """Addresses that a peer names over a circuit, as far as it may."""
        policy, ip = self._network.policy, self._network.ip_of(conn)
        fitting = policy.plausible([str(addr) for addr in addrs], ip)
        return [Multiaddr(addr) for addr in fitting if (at := ip_of(Multiaddr(addr))) and policy.objection(at) is None]

    async def _answer_dcutr(self, stream: ByteStream) -> None:
        """The caller's side of `_punch`."""
        messages = MessageStream(stream, max_message_bytes=dcutr.MAX_MESSAGE_BYTES)
        target = ID.from_base58(stream.remote_peer)
        with _within(ASK_S, stream.remote_peer):
            if not self.seen_at:
                await self._be_seen()
            theirs = await dcutr.follow(messages, self.seen_at)
        conn = self._network.live_conn(target)
        if self._port is None or conn is None or not conn.is_relayed:
            return
        if not self._network.policy.may_punch(stream.remote_peer):
            raise ProtocolViolation("wants too many holes punched")
        where = self._said(theirs, conn)
        log.debug("we are seen at %s, they at %s", self.seen_at, where)
        if await self._network.punch(target, where, self._port, is_client=True, within_s=PUNCH_S):
            self._punched.add(stream.remote_peer)

    async def _be_seen(self) -> None:
        """A peer that only asks takes no place at a relay; it learns from those that it calls through."""
        for conns in list(self._network.connections.values()):
            for conn in conns:
                if isinstance(conn, NetworkConn) and conn.circuit is not None:
                    relay = PeerId(str(conn.circuit.get_transport_addresses()[0]).split("/p2p/")[1].split("/")[0])
                    with suppress(SwarmError):
                        await self.see(relay)
                        return

    # -- for others ----------------------------------------------------------------------------------------------------

    def start_relaying(self, limits: RelayLimits, addrs: Callable[[], Sequence[str]]) -> Relay:
        """Be a relay from now on. `addrs`: where we are reached, with /p2p/."""
        self.relay = relay = Relay(
            self._streams.libp2p, limits, self._open_stop, self._has_direct, addrs, self._house_of
        )

        async def answer(stream: ByteStream) -> None:
            conn = self._network.live_conn(ID.from_base58(stream.remote_peer))
            await relay.answer(stream, relayed=conn is not None and conn.is_relayed)

        self._streams.set_handler(circuit.HOP, answer)
        return relay

    async def _open_stop(self, peer_id: PeerId) -> ByteStream:
        return await self._streams.open_stream(peer_id, circuit.STOP)

    def _has_place(self, peer_id: ID) -> bool:
        return self.relay is not None and self.relay.keeps(PeerId(str(peer_id)))

    def _house_of(self, peer_id: PeerId) -> str | None:
        ip = self._network.ip_of_peer(ID.from_base58(peer_id))
        return None if ip is None or reach_of(ip) is Reach.MACHINE else house_of(ip)

    def _has_direct(self, peer_id: PeerId) -> bool:
        return self._network.has_direct(ID.from_base58(peer_id))


@contextmanager
def _within(seconds: float, peer_id: PeerId) -> Iterator[None]:
    """Silence for longer is PeerUnreachable."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise PeerUnreachable(f"peer …{peer_id[-6:]} did not answer within {seconds:g} s", peer_id)


def _is_direct(addr: str) -> bool:
    try:
        tcp_endpoint(Multiaddr(addr))
    except SwarmException:
        return False
    return True
