"""The plug: a py-libp2p Swarm whose connections are ours, so that BasicHost, identify and KadDHT run on it unchanged.

What of the library's Swarm (0.8.1) is replaced, and why:

* Upgrading. Its yamux class is hard-coded (muxer_multistream.py), its secure channel loses the nonce when cancelled.
* Dialling. It tries one TCP address per peer, waits 250 ms for a second, retries with back-off, and then refuses the
  peer for a minute (`_negative_peer_cache`). Ours races all addresses and is bounded.
* Inbound connections. It holds a token per connection until the *swarm* ends, so that after 250 of them it accepts no
  more; its listener shares ports with strangers (SO_REUSEPORT). Ours are in peer/net/host.py.
* `add_conn`: resource-manager limits that are off by one, and 0.1 s of sleep for each connection closed.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Any, Literal, cast

import trio
from libp2p.abc import IMuxedConn, IMuxedStream, INetConn, IPeerStore, IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as new_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.rcmgr import Direction
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.peer.base.concurrency import shielded_for
from petals.peer.net.libp2p.peerstore import BoundedPeerStore
from petals.peer.net.wire.addresses import Circuit, circuit_of, ip_of, tcp_endpoint
from petals.peer.net.wire.byte_pipe import CircuitPipe, Pipe, RawPipe, tcp_pipe
from petals.peer.net.wire.circuit import CircuitConn
from petals.peer.net.wire.dial_policy import PUNCH_ADDRS, PUNCH_DIALS, DialPolicy
from petals.peer.net.wire.multistream import MULTISTREAM, Dialler, Listener, encode_line, proposal
from petals.peer.net.wire.muxer import Connection, MuxedStream, MuxerConfig, at_once
from petals.peer.net.wire.noise import MAX_FRAME_BYTES, NoiseFraming
from petals.peer.net.wire.pnet import NONCE_BYTES, SwarmCipher, SwarmKey, WrongSwarmKey, make_nonce
from petals.peer.net.wire.pnet_stream import PrivateConnection, PrivatePipe
from petals.peer.net.wire.yamux import PROTOCOL as YAMUX_ID
from petals.protocols.errors import ProtocolViolation, RemoteError
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

_HANDSHAKE_ERRORS = (
    BaseLibp2pError,
    ProtocolViolation,
    OSError,
    EOFError,
    ValueError,  # protobuf's DecodeError and the key parsers
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
)
_PUNCH_AGAIN_S = 0.1
_STAGGER_S = 0.1
"""Between the starts of dials to several addresses of one peer: the first listed gets a head start."""


_BLOCKED = "it is blocked here"


def peer_id_text(peer_id: ID) -> PeerId:
    return PeerId(str(peer_id))


@lru_cache(maxsize=1024)
def library_id(peer_id: PeerId) -> ID:
    """The library's form of a name, remembered: decoding base58 takes longer than what is looked up with it. For names
    of peers that are, or were, connected; raises ValueError for others that are none."""
    return ID.from_base58(peer_id)


# -- from a socket to a connection -----------------------------------------------------------------------------------


_GREETING = encode_line(MULTISTREAM)


class _Lines:
    """multistream-select before Noise, on a raw connection."""

    def __init__(self, raw: IRawConnection) -> None:
        self._raw = raw
        self._heard = b""

    @property
    def greeted(self) -> bool:
        """Whether the peer has said the first word of every libp2p connection."""
        return self._heard == _GREETING

    async def dial(self, protocol: str) -> None:
        dialler = Dialler(protocol)
        await self._raw.write(proposal(protocol))
        while (agreed := dialler.agreed()) is None:
            dialler.receive_data(await self._read(dialler.wanted()))
        if not agreed:
            raise ProtocolViolation(f"peer does not speak {protocol}")

    async def listen(self, protocol: str) -> None:
        listener = Listener({protocol})
        while True:
            chosen = listener.chosen()
            if output := listener.take_output():
                await self._raw.write(output)
            if chosen:
                return
            listener.receive_data(await self._read(listener.wanted()))

    async def _read(self, n: int) -> bytes:
        data = await self._raw.read(n)
        if not data:
            raise EOFError("peer closed the connection during the handshake")
        if not self.greeted:  # bytes under a swarm key would else be a length, and waited for
            self._heard += data[: len(_GREETING) - len(self._heard)]
            if not _GREETING.startswith(self._heard):
                raise ProtocolViolation("what is there speaks no libp2p, or wants a swarm key (--swarm_key FILE)")
        return data


class _Channel:
    """Noise frames on a pipe, as far as the muxer's negotiation needs them."""

    def __init__(self, pipe: Pipe, framing: NoiseFraming) -> None:
        self._pipe, self._framing = pipe, framing
        self._buffer, self._end = bytearray(MAX_FRAME_BYTES), 0

    async def send(self, data: bytes) -> None:
        await self._pipe.send_all(b"".join(self._framing.encrypt([data])))

    async def receive(self) -> bytes:
        while True:
            with memoryview(self._buffer) as view:
                plaintexts, used = self._framing.decrypt(view[: self._end])
                if used:
                    view[: self._end - used] = bytes(view[used : self._end])
                    self._end -= used
                    return b"".join(plaintexts)
                received = await self._pipe.receive_into(view[self._end :])
            if not received:
                raise EOFError("peer closed the connection during the handshake")
            self._end += received

    def rest(self) -> bytes:
        return bytes(self._buffer[: self._end])


async def upgrade(
    raw: IRawConnection,
    noise: NoiseTransport,
    *,
    expected: ID | None,
    is_client: bool,
    on_stream: Callable[[MuxedStream], None],
    pace: Callable[[PeerId], float] = at_once,
    config: MuxerConfig,
    swarm_key: SwarmKey | None = None,
) -> tuple[ID, Connection]:
    """Secure and mux a raw connection.

    Args:
        expected: whom we dialled; None: we listened, and take whoever can prove who it is.
        pace: as `Connection` wants it.
        is_client: who speaks first. Who dials does, but for one of two who dialled each other at once.
        swarm_key: what both ends must have; None: neither has one.
    Raises: one of _HANDSHAKE_ERRORS; WrongSwarmKey as soon as it shows. The caller closes `raw` then.
    """
    if swarm_key is not None:
        raw = PrivateConnection(raw, SwarmCipher(swarm_key, make_nonce(secrets.token_bytes(NONCE_BYTES))))
        await raw.begin()
    lines = _Lines(raw)
    try:
        await (lines.dial(NOISE_ID) if is_client else lines.listen(NOISE_ID))
    except _HANDSHAKE_ERRORS as error:
        if swarm_key is not None and not lines.greeted:  # whoever reads our bytes with another key hangs up
            raise WrongSwarmKey from error
        raise
    session = await _shake_hands(raw, noise, expected, is_client=is_client)
    # The library's handshake, our transport messages: take the two keys out of its state.
    protocol = cast(Any, session.conn).noise_state.noise_protocol
    framing = NoiseFraming(protocol.cipher_state_encrypt.k, protocol.cipher_state_decrypt.k)
    pipe = _pipe_of(raw)
    channel = _Channel(pipe, framing)
    early = await _agree_on_yamux(channel, is_client=is_client)
    remote = session.get_remote_peer()
    connection = Connection(
        pipe,
        framing,
        remote_peer=peer_id_text(remote),
        is_client=is_client,
        on_stream=on_stream,
        pace=pace,
        config=config,
        early=([early] if early else [], channel.rest()),
    )
    return remote, connection


async def _shake_hands(
    raw: IRawConnection, noise: NoiseTransport, expected: ID | None, *, is_client: bool
) -> SecureSession:
    try:
        if is_client:
            assert expected is not None
            secured = await noise.secure_outbound(raw, expected)
        else:
            secured = await noise.secure_inbound(raw)
    except Exception as error:  # four libraries parse a stranger's bytes here, and raise what they like
        raise ProtocolViolation(f"Noise handshake failed: {error or type(error).__name__}") from error
    session = cast(SecureSession, secured)
    if expected is not None and session.get_remote_peer() != expected:
        raise ProtocolViolation("somebody else answers there")
    return session


async def _agree_on_yamux(channel: _Channel, *, is_client: bool) -> bytes:
    """Returns what the peer sent after the agreement already: it need not wait for ours."""
    if is_client:
        dialler = Dialler(YAMUX_ID)
        await channel.send(proposal(YAMUX_ID))
        while (agreed := dialler.agreed()) is None:
            dialler.receive_data(await channel.receive())
        if not agreed:
            raise ProtocolViolation(f"peer does not speak {YAMUX_ID}")
        return dialler.rest()
    listener = Listener({YAMUX_ID})
    while True:
        chosen = listener.chosen()
        if output := listener.take_output():
            await channel.send(output)
        if chosen:
            return listener.rest()
        listener.receive_data(await channel.receive())


def _pipe_of(raw: IRawConnection) -> Pipe:
    if isinstance(raw, PrivateConnection):
        return PrivatePipe(_pipe_of(raw.carrier), raw.cipher)
    if isinstance(raw, RawConnection) and isinstance(raw.stream, TrioTCPStream):
        return tcp_pipe(raw.stream.stream)
    return CircuitPipe(raw) if isinstance(raw, CircuitConn) else RawPipe(raw)


# -- what the library expects of a connection and a stream -----------------------------------------------------------


class LibraryStream(IMuxedStream):
    """Our stream with the library's habits: its end is an exception."""

    def __init__(self, stream: MuxedStream, muxed_conn: IMuxedConn, most: int | None = None) -> None:
        self.stream = stream
        self._left = most
        self.muxed_conn = muxed_conn

    async def read(self, n: int | None = None) -> bytes:
        if n == 0:
            return b""
        try:
            data = await self.stream.read(1 << 20 if n is None or n < 0 else n)
        except RemoteError as error:
            raise MuxedStreamReset(str(error)) from error
        except trio.ClosedResourceError as error:
            raise MuxedStreamError(str(error)) from error
        if not data:
            raise MuxedStreamEOF("the peer closed the stream")
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise ProtocolViolation("too many bytes on one stream")
        return bytes(data)

    async def write(self, data: bytes) -> None:
        try:
            await self.stream.write(data)
        except RemoteError as error:
            raise MuxedStreamReset(str(error)) from error
        except trio.ClosedResourceError as error:
            raise MuxedStreamError(str(error)) from error

    async def close_write(self) -> None:
        await self.stream.close_write()

    async def close(self) -> None:
        await self.stream.close()

    async def reset(self) -> None:
        await self.stream.reset()

    def set_deadline(self, ttl: int) -> None:
        raise NotImplementedError("use trio's deadlines")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.muxed_conn.remote_endpoint if isinstance(self.muxed_conn, LibraryConn) else None

    async def __aenter__(self) -> IMuxedStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class LibraryConn(IMuxedConn):
    """Our connection as the library's Swarm keeps it. Streams the peer opens never come this way (see `Network`)."""

    def __init__(self, connection: Connection, peer_id: ID, raw: IRawConnection) -> None:
        self.connection = connection
        self.peer_id = peer_id
        self.event_started = trio.Event()
        self.on_close: Callable[[], Awaitable[None]] | None = None
        """The library hangs a hook here; `Network._run_conn` does what it would."""
        self.conn: NetworkConn | None = None
        self.circuit = raw if isinstance(raw, CircuitConn) else None
        self._addrs = raw.get_transport_addresses()
        self._type = raw.get_connection_type()
        self.remote_endpoint = raw.get_remote_address()
        """IP address and port as we see them; None: it comes through a relay."""
        self._is_initiator = raw.is_initiator

    @property
    def is_initiator(self) -> bool:
        return self._is_initiator

    @property
    def is_established(self) -> bool:
        return not self.is_closed

    @property
    def is_closed(self) -> bool:
        return self.connection.error is not None

    async def start(self) -> None:
        self.event_started.set()
        await self.connection.run()

    async def close(self) -> None:
        await self.connection.close()

    async def open_stream(self) -> IMuxedStream:
        try:
            return LibraryStream(self.connection.open_stream(), self)
        except RemoteError as error:
            raise MuxedConnUnavailable(str(error)) from error

    async def accept_stream(self) -> IMuxedStream:
        await self.connection.closed.wait()
        raise MuxedConnUnavailable(str(self.connection.error))

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._addrs

    def get_connection_type(self) -> ConnectionType:
        return self._type


class NetworkConn(SwarmConn):
    """The library's connection entry, without the nap of 0.1 s at its end."""

    @property
    def takes_streams(self) -> bool:
        muxed = self.muxed_conn
        return not self.is_closed and (not isinstance(muxed, LibraryConn) or muxed.connection.takes_streams)

    @property
    def circuit(self) -> CircuitConn | None:
        """What carries it, if that is a circuit through a relay."""
        return self.muxed_conn.circuit if isinstance(self.muxed_conn, LibraryConn) else None

    @property
    def is_relayed(self) -> bool:
        return self.circuit is not None

    def rank(self) -> int:
        """The lower the better."""
        circuit = self.circuit
        return 0 if circuit is None else 2 if circuit.is_fading else 1

    async def _cleanup(self) -> None:
        self.swarm.remove_conn(self)
        for stream in self.streams.copy():
            await stream.reset()
        await self._notify_disconnected()


def _ours(conn: INetConn) -> NetworkConn:
    assert isinstance(conn, NetworkConn)
    return conn


# -- the network -----------------------------------------------------------------------------------------------------


@dataclass
class _Dial:
    """One dial under way; whoever wants the peer waits for the same."""

    addrs: Sequence[Multiaddr]
    done: trio.Event = field(default_factory=trio.Event)
    connection: NetworkConn | None = None
    error: Exception | None = None


class _NoAutoConnector(AutoConnector):
    """Dials nobody: even with all its targets at zero the library's would dial every peer it has heard of."""

    async def run_background_task(self, nursery: trio.Nursery) -> None: ...

    async def maybe_connect(self) -> None: ...


class Network(Swarm):
    """A Swarm with our connections, dials and bounds.

    Attributes:
        nursery: runs the connections; set by the host before the first of them.
        open_circuit: dials through a relay, or raises SwarmException.
        on_stream: takes each stream a peer opens, before its protocol is known.
        pace: told of each of them first; returns the seconds for which that peer is not read any further.
        on_frozen: told, before anybody else, of a peer that the keep-alive has given up.
        is_wanted: says whether a connection without a stream serves a purpose all the same.
        is_frozen: says whether a peer has stopped answering, so that dialling it would only wait.
    """

    nursery: trio.Nursery
    open_circuit: Callable[[Circuit, ID, Multiaddr], Awaitable[CircuitConn]]
    on_stream: Callable[[NetworkConn, MuxedStream], None]
    pace: Callable[[PeerId], float]
    on_frozen: Callable[[ID], None]
    is_frozen: Callable[[ID], bool]
    is_wanted: Callable[[ID], bool]

    def __init__(
        self,
        key_pair: KeyPair,
        *,
        transport: Literal["petals", "stock"],
        muxer: MuxerConfig,
        connect_s: float,
        handshake_s: float,
        max_connections: int,
        max_connections_per_peer: int,
        swarm_key: SwarmKey | None = None,
        blocked: frozenset[PeerId] = frozenset(),
    ) -> None:
        self._swarm_key, self._blocked = swarm_key, blocked
        self._noise = NoiseTransport(key_pair, noise_privkey=new_noise_key_pair().private_key)
        self._muxer, self._transport = muxer, transport
        self._connect_s, self._handshake_s = connect_s, handshake_s
        peer_id = ID.from_pubkey(key_pair.public_key)
        peerstore: IPeerStore = BoundedPeerStore(self._plausible)
        peerstore.add_key_pair(peer_id, key_pair)
        super().__init__(
            peer_id,
            peerstore,
            TransportUpgrader({NOISE_ID: self._noise}, {TProtocol(YAMUX_ID): Yamux}),  # the stock stack's; Noise only
            transports=[TCP()],
            connection_config=ConnectionConfig(
                max_connections=max_connections,
                high_watermark=max_connections,
                min_connections=0,
                low_watermark=0,
                max_connections_per_peer=max_connections_per_peer,
            ),
        )
        self.auto_connector = _NoAutoConnector(swarm=self)
        self._dials: dict[ID, _Dial] = {}
        self._punches: dict[ID, trio.CancelScope] = {}
        self._called_from: dict[tuple[str, int], ID] = {}
        """Endpoints that we dial at this moment as clients, while they dial us: whose socket wins is open."""
        self.policy = DialPolicy(self._seen_ips, trio.current_time)
        """Which addresses are dialled."""

    def _seen_ips(self) -> Iterable[str]:
        return filter(None, map(self.ip_of, map(_ours, self.get_connections())))

    def ip_of(self, conn: NetworkConn) -> str | None:
        """Where a connection comes from, or its relay; None: not known any more."""
        if conn.circuit is not None:
            way = circuit_of(conn.circuit.get_transport_addresses()[0])
            relay = None if way is None else self.live_conn(way.relay)
            return None if relay is None or relay is conn or relay.is_relayed else self.ip_of(relay)
        endpoint = conn.muxed_conn.remote_endpoint if isinstance(conn.muxed_conn, LibraryConn) else None
        return None if endpoint is None else endpoint[0]

    def ip_of_peer(self, peer_id: ID) -> str | None:
        """Where a peer talks to us from; None: it is not connected."""
        conn = self.live_conn(peer_id)
        return None if conn is None else self.ip_of(conn)

    # -- connections -----------------------------------------------------------------------------------------------

    def live_conn(self, peer_id: ID) -> NetworkConn | None:
        """The best connection on which a stream can be opened: without a relay, if there is one."""
        usable = [conn for conn in map(_ours, self.connections.get(peer_id, ())) if conn.takes_streams]
        return min(usable, key=NetworkConn.rank, default=None)

    def conn_of(self, peer_id: ID, connection: Connection) -> NetworkConn | None:
        """Under which name a connection is listed."""
        for conn in map(_ours, self.connections.get(peer_id, ())):
            if isinstance(conn.muxed_conn, LibraryConn) and conn.muxed_conn.connection is connection:
                return conn
        return None

    def has_direct(self, peer_id: ID) -> bool:
        """Whether there is a way to `peer_id` without a relay."""
        conn = self.live_conn(peer_id)
        return conn is not None and not conn.is_relayed

    def _plausible(self, peer_id: ID, addrs: Sequence[Multiaddr]) -> list[Multiaddr]:
        """Those of a peer's addresses that it may name, if it is connected: else the user, or a record, says them."""
        ip = self.ip_of_peer(peer_id)
        if ip is None:
            return list(addrs)
        fitting = set(self.policy.plausible([str(addr) for addr in addrs], ip))
        return [addr for addr in addrs if str(addr) in fitting]

    def is_blocked(self, peer_id: ID) -> bool:
        return peer_id_text(peer_id) in self._blocked

    async def accept(self, stream: trio.SocketStream, maddr: Multiaddr) -> None:
        """A stranger's socket: make it a connection within `handshake_s`, or close it. Never raises."""
        raw = RawConnection(TrioTCPStream(stream), False)
        try:
            expected = self._called_from.get(stream.socket.getpeername()[:2])
            with trio.fail_after(self._handshake_s):
                await self._upgrade(raw, expected, is_client=expected is not None)
        except _HANDSHAKE_ERRORS as error:
            if isinstance(error.__cause__, WrongSwarmKey):
                log.info("connection at %s refused: %s", maddr, error.__cause__)
            else:
                log.debug("inbound connection at %s refused: %r", maddr, error)

    async def accept_circuit(self, circuit: CircuitConn) -> NetworkConn:
        """A call that came through a relay. Raises SwarmException."""
        with trio.move_on_after(self._handshake_s):
            return cast(NetworkConn, await self._upgrade(circuit, None, is_client=False))
        raise SwarmException(f"no handshake in {self._handshake_s:g} s")

    async def upgrade_inbound_raw_conn(self, raw_conn: IRawConnection, maddr: Multiaddr) -> IMuxedConn:
        return (await self._upgrade(raw_conn, None, is_client=False)).muxed_conn

    async def upgrade_outbound_raw_conn(
        self, raw_conn: IRawConnection, peer_id: ID, pre_scope: object = None
    ) -> SwarmConn:
        return await self._upgrade(raw_conn, peer_id, is_client=True)

    async def _upgrade(self, raw: IRawConnection, expected: ID | None, *, is_client: bool) -> SwarmConn:
        """Raises SwarmException; `raw` is closed then."""
        try:
            if self._is_full() and self._idle_conn() is None:
                raise SwarmException(f"{self.connection_config.max_connections} connections are open already")
            if self._transport == "stock":
                muxed = await self._mux_stock(raw, expected)
            else:
                muxed = await self._mux(raw, expected, is_client=is_client)
            if self.is_blocked(muxed.peer_id):
                raise SwarmException(_BLOCKED)
            return await self.add_conn(muxed, "outbound" if is_client else "inbound")
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await raw.close()
            if isinstance(error, _HANDSHAKE_ERRORS) and not isinstance(error, SwarmException):
                raise SwarmException(f"handshake failed: {error or type(error).__name__}") from error
            raise

    async def _mux(self, raw: IRawConnection, expected: ID | None, *, is_client: bool) -> IMuxedConn:
        muxed: LibraryConn

        def on_stream(stream: MuxedStream) -> None:
            assert muxed.conn is not None  # set by add_conn, before the connection runs
            self.on_stream(muxed.conn, stream)

        peer_id, connection = await upgrade(
            raw,
            self._noise,
            expected=expected,
            is_client=is_client,
            on_stream=on_stream,
            pace=self.pace,
            config=self._muxer,
            swarm_key=self._swarm_key,
        )
        connection.on_frozen = lambda: self.on_frozen(peer_id)
        muxed = LibraryConn(connection, peer_id, raw)
        return muxed

    async def _mux_stock(self, raw: IRawConnection, expected: ID | None) -> IMuxedConn:
        secured: ISecureConn = await self.upgrader.upgrade_security(raw, expected is not None, expected)
        return await self.upgrader.upgrade_connection(secured, secured.get_remote_peer())

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> SwarmConn:
        """Run `muxed_conn`, list it, tell the notifees. Raises SwarmException when the peer has enough connections."""
        peer_id = muxed_conn.peer_id
        conn = NetworkConn(muxed_conn, self, direction)
        if isinstance(muxed_conn, LibraryConn):
            muxed_conn.conn = conn
        conn.set_transport_info(muxed_conn.get_transport_addresses(), muxed_conn.get_connection_type())
        conn.set_negotiated_protocols(NOISE_ID, YAMUX_ID)
        known = self.connections.get(peer_id, [])
        if len(known) >= self.connection_config.max_connections_per_peer:
            await muxed_conn.close()
            raise SwarmException(f"{len(known)} connections to {peer_id} are open already")
        if self._is_full() and (idle := self._idle_conn()) is not None:
            self.nursery.start_soon(idle.close)
        self.connections.setdefault(peer_id, []).append(conn)
        if not conn.is_relayed and (punch := self._punches.get(peer_id)) is not None:
            punch.cancel()
        self.nursery.start_soon(self._run_conn, conn)
        await muxed_conn.event_started.wait()
        self.nursery.start_soon(self._run_accepting, conn)
        await conn.event_started.wait()
        await self.notify_connected(conn)
        return conn

    def _is_full(self) -> bool:
        return self.get_total_connections() >= self.connection_config.max_connections

    def _idle_conn(self) -> NetworkConn | None:
        """The oldest connection that a peer opened and uses for nothing now: it makes room for a newcomer, so that a
        thousand silent strangers keep nobody out. Who is served has a stream open."""
        for conn in self.get_connections():
            muxed = conn.muxed_conn
            if not isinstance(muxed, LibraryConn) or muxed.is_initiator or self.is_wanted(muxed.peer_id):
                continue
            if muxed.connection.is_idle:
                return cast(NetworkConn, conn)
        return None

    async def _run_conn(self, conn: NetworkConn) -> None:
        try:
            await conn.muxed_conn.start()
        except Exception:  # a bug of ours or of the library: it costs this connection, not the node
            log.exception("connection to %s failed", conn.muxed_conn.peer_id)
        finally:
            with shielded_for(self._muxer.close_s):
                await conn.close()

    async def _run_accepting(self, conn: NetworkConn) -> None:
        try:
            await conn.start()
        except Exception:
            log.exception("accepting streams of %s failed", conn.muxed_conn.peer_id)

    async def close_connections(self) -> None:
        """Say goodbye to everybody at once, bounded by the muxer's `close_s`."""
        async with trio.open_nursery() as nursery:
            for conn in self.get_connections():
                nursery.start_soon(self._close_connection_async, conn)

    def library_stream(self, conn: NetworkConn, stream: MuxedStream, protocol: TProtocol, most: int) -> NetStream:
        """A peer's stream as the library's handlers take it; they read at most so many bytes."""
        net_stream = NetStream(LibraryStream(stream, conn.muxed_conn, most), conn, None)
        net_stream.set_protocol(protocol)
        net_stream._direction = Direction.INBOUND
        conn.streams.add(net_stream)
        return net_stream

    # -- dialling --------------------------------------------------------------------------------------------------

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """The library's way in: dial what the peerstore knows."""
        try:
            addrs = self.peerstore.addrs(peer_id)
        except PeerStoreError:
            addrs = []
        return [await self.dial(peer_id, addrs)]

    async def dial(self, peer_id: ID, addrs: Sequence[Multiaddr]) -> NetworkConn:
        """A live connection to `peer_id`: the one there is, or the first of `addrs` that answers within `connect_s`.

        Who is cancelled here stops waiting; the dial goes on. A search gives each peer moments to answer: when it threw
        the handshake away each time, newcomers in a crowd dialled 5 to 24 times for each connection they got, and
        kept each other too busy to answer (25 joining 25, all on one core, 2026-11-28).

        Raises:
            SwarmException: nobody answered; the message says why, address by address.
        """
        while True:
            if (conn := self.live_conn(peer_id)) is not None:
                return conn
            if self.is_frozen(peer_id):
                raise SwarmException("it has stopped answering")
            if self.is_blocked(peer_id):
                raise SwarmException(_BLOCKED)
            if self.nursery.cancel_scope.cancel_called:
                raise SwarmException("this peer is leaving")
            if (dial := self._dials.get(peer_id)) is None:
                dial = self._dials[peer_id] = _Dial(addrs)
                self.nursery.start_soon(self._dial_for_all, peer_id, dial)
            await dial.done.wait()
            if dial.connection is not None:  # it may be closed already: another dial to who hangs up at once is no use
                return dial.connection
            if isinstance(dial.error, SwarmException):
                if set(addrs) <= set(dial.addrs):
                    raise SwarmException(str(dial.error))
            elif dial.error is not None:
                raise dial.error
            # The dial was cut off, or somebody else's did not try all of our addresses: look again.

    async def _dial_for_all(self, peer_id: ID, dial: _Dial) -> None:
        try:
            dial.connection = await self.race(peer_id, dial.addrs)
        except Exception as error:  # kept, not handled: raised again by those who wait
            dial.error = error
        finally:
            del self._dials[peer_id]
            dial.done.set()

    async def race(self, peer_id: ID, addrs: Sequence[Multiaddr]) -> NetworkConn:
        """Dial all of `addrs`, staggered; the first connection wins. Raises SwarmException."""
        if not addrs:
            raise SwarmException("no address of it is known")
        winners: list[NetworkConn] = []
        under = " under our swarm key" if self._swarm_key is not None else ""
        failures: dict[str, str] = {str(addr): f"no answer in {self._connect_s:g} s{under}" for addr in addrs}
        with trio.move_on_after(self._connect_s):
            async with trio.open_nursery() as nursery:

                async def attempt(addr: Multiaddr, gave_up: trio.Event) -> None:
                    try:
                        winners.append(await self._dial_one(peer_id, addr))
                        nursery.cancel_scope.cancel()
                    except (*_HANDSHAKE_ERRORS, *_CONNECT_ERRORS) as error:
                        failures[str(addr)] = _reason(error)
                    finally:
                        gave_up.set()

                for addr in sorted(addrs, key=lambda addr: "/p2p-circuit" in str(addr)):  # relays last
                    gave_up = trio.Event()
                    nursery.start_soon(attempt, addr, gave_up)
                    with trio.move_on_after(_STAGGER_S):
                        await gave_up.wait()
        if winners:
            return winners[0]
        raise SwarmException("; ".join(f"{addr}: {reason}" for addr, reason in failures.items()))

    async def _dial_one(self, peer_id: ID, addr: Multiaddr) -> NetworkConn:
        circuit = circuit_of(addr)
        if circuit is not None:
            raw: IRawConnection = await self.open_circuit(circuit, peer_id, addr)
            return cast(NetworkConn, await self._upgrade(raw, peer_id, is_client=True))
        host, port = tcp_endpoint(addr)
        ip, why_not = await self._resolve(host, port)
        if why_not is not None:
            raise SwarmException(why_not)
        try:
            raw = RawConnection(TrioTCPStream(await trio.open_tcp_stream(ip, port)), True)
            return cast(NetworkConn, await self._upgrade(raw, peer_id, is_client=True))
        except (*_HANDSHAKE_ERRORS, *_CONNECT_ERRORS):
            self.policy.failed(ip)
            raise
        except trio.Cancelled:  # nobody answers, or another address was sooner: which of them is not known
            if self.live_conn(peer_id) is None:
                self.policy.failed(ip)
            raise

    async def _resolve(self, host: str, port: int) -> tuple[str, str | None]:
        """The IP address of a host that may be dialled, and why none may be. Raises OSError."""
        why_not: str | None = "it has no IP address"
        for *_, where in await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            ip = str(where[0])
            if (why_not := self.policy.objection(ip)) is None:
                return ip, None
        return host, why_not

    # -- from the port that is listened on ---------------------------------------------------------------------------
    # A router that has seen a packet go out from a port lets answers in, and as a rule gives the port one name outside
    # whoever it talks to. So what others see of these connections is where we might be dialled.

    async def dial_from_port(self, peer_id: ID, addr: Multiaddr, port: int) -> NetworkConn:
        """One more connection to `peer_id`, from our listening port. Raises SwarmException."""
        with trio.move_on_after(self._connect_s):
            try:
                raw = RawConnection(TrioTCPStream(await _open_tcp_from(port, *tcp_endpoint(addr))), True)
                return cast(NetworkConn, await self._upgrade(raw, peer_id, is_client=True))
            except OSError as error:
                raise SwarmException(_reason(error)) from None
        raise SwarmException(f"no answer in {self._connect_s:g} s")

    async def punch(
        self, peer_id: ID, addrs: Sequence[Multiaddr], port: int, *, is_client: bool, within_s: float
    ) -> bool:
        """Dial `addrs` again and again from our listening port while the peer does the same; whether a connection came
        of it, whoever's."""
        endpoints: list[tuple[str, int]] = []
        for addr in addrs:
            with contextlib.suppress(SwarmException):
                if ip_of(addr) is not None and (endpoint := tcp_endpoint(addr)) not in endpoints:
                    endpoints.append(endpoint)
        del endpoints[PUNCH_ADDRS:]
        with trio.move_on_after(within_s) as scope:
            self._punches[peer_id] = scope
            if is_client:
                self._called_from.update(dict.fromkeys(endpoints, peer_id))
            try:
                async with trio.open_nursery() as nursery:
                    for endpoint in endpoints:
                        nursery.start_soon(self._keep_dialling, peer_id, port, endpoint, is_client)
            finally:
                self._punches.pop(peer_id, None)
                for endpoint in endpoints:
                    self._called_from.pop(endpoint, None)
        return self.has_direct(peer_id)

    async def _keep_dialling(self, peer_id: ID, port: int, endpoint: tuple[str, int], is_client: bool) -> None:
        for _ in range(PUNCH_DIALS):
            if self.has_direct(peer_id):
                return
            try:
                raw = RawConnection(TrioTCPStream(await _open_tcp_from(port, *endpoint)), is_client)
                # Not cut short by the other socket's success: of two connections both ends keep both.
                with shielded_for(self._handshake_s):
                    await self._upgrade(raw, peer_id, is_client=is_client)
            except (OSError, SwarmException) as error:
                log.debug("punching %s at %s: %s", peer_id, endpoint, error)
                await trio.sleep(_PUNCH_AGAIN_S)

    async def answers_at(self, peer_id: ID, addr: Multiaddr) -> bool:
        """Whether a fresh dial of `addr` finds `peer_id`; the connection is closed at once."""
        with trio.move_on_after(self._connect_s):
            try:
                stream = await trio.open_tcp_stream(*tcp_endpoint(addr))
            except (OSError, SwarmException, *_CONNECT_ERRORS) as error:
                log.debug("no dial-back of %s at %s: %s", peer_id, addr, error)
                return False
            async with stream:
                try:
                    await upgrade(
                        RawConnection(TrioTCPStream(stream), True),
                        self._noise,
                        expected=peer_id,
                        is_client=True,
                        on_stream=MuxedStream.reset_nowait,
                        config=self._muxer,
                        swarm_key=self._swarm_key,
                    )
                except _HANDSHAKE_ERRORS as error:
                    log.debug("no dial-back of %s at %s: %s", peer_id, addr, error)
                    return False
                return True
        return False


async def _open_tcp_from(port: int, host: str, to_port: int) -> trio.SocketStream:
    """Connect from a port that is listened on already. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        share_port(sock)
        await sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
        await sock.connect((host, to_port))
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


def share_port(sock: trio.socket.SocketType) -> None:
    """Let sockets of ours that share a port with `sock` be bound. To be called after listening, so that a port that
    somebody else has is still an error."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


_CONNECT_ERRORS = (ExceptionGroup,)  # trio.open_tcp_stream, when a name has several addresses


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.__cause__ is not None:
        error = error.__cause__  # "all attempts to connect failed" says less than its cause
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
