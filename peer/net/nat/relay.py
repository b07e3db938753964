"""A relay for others (libp2p specs, relay/circuit-v2.md): keeps places, joins two streams, sees ciphertext only.

py-libp2p's own service (0.8.1) knows one circuit per called peer and closes it when another one ends; ours is a copy
loop per direction with the streams' own back-pressure, under limits that fit tensors.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio
from google.protobuf.message import DecodeError
from libp2p.abc import IHost
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status
from libp2p.relay.circuit_v2.resources import RelayLimits as LibraryLimits
from libp2p.relay.circuit_v2.resources import Reservation
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.peer.base.concurrency import shielded_for
from petals.peer.base.config import RelayLimits
from petals.peer.base.token_bucket import TokenBucket
from petals.peer.net.wire.circuit import MAX_MESSAGE_BYTES, CircuitLimit, announce
from petals.protocols.errors import RemoteError, RemoteProtocolError
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.types import MAX_PEER_ID_BYTES, PeerId

log = logging.getLogger(__name__)

_PIECE_BYTES = 64 << 10
_BURST_S = 0.1
GOODBYE_S = 1.0
SHARE = 4
ASK_S = 15.0
"""What a peer may take to say what it wants, and the called one to take the call."""


class Relay:
    """Answers `HOP` streams.

    Args:
        host: signs the vouchers.
        open_stop: (called peer) -> a `STOP` stream on the connection it has with us.
        is_connected: whether a peer still has a direct connection to us.
        addrs: where we are reached, with /p2p/.
        house_of: peer -> the IP address (of version 6: the network) that it comes from; None: not known, or our own
            machine. Names are free, addresses are not: one of them has a `SHARE`th of the places and circuits.
    """

    def __init__(
        self,
        host: IHost,
        limits: RelayLimits,
        open_stop: Callable[[PeerId], Awaitable[ByteStream]],
        is_connected: Callable[[PeerId], bool],
        addrs: Callable[[], Sequence[str]],
        house_of: Callable[[PeerId], str | None] = lambda _: None,
    ) -> None:
        self.limits = limits
        self.passed_bytes = 0
        self._host, self._open_stop, self._is_connected, self._addrs = host, open_stop, is_connected, addrs
        self._house_of = house_of
        self._places: dict[PeerId, float] = {}
        self._circuits: Counter[PeerId] = Counter()
        rate = limits.bytes_per_s
        self._bucket = TokenBucket(rate, max(_PIECE_BYTES, rate * _BURST_S)) if rate > 0 else None

    @property
    def circuits(self) -> int:
        """Open now."""
        return self._circuits.total()

    @property
    def places(self) -> int:
        """Reserved now."""
        return len(self._places)

    def keeps(self, peer_id: PeerId) -> bool:
        """Whether a peer has a place here: it is called over the connection it has with us."""
        return self._places.get(peer_id, 0.0) > trio.current_time()

    async def answer(self, stream: ByteStream, *, relayed: bool) -> None:
        """One `HOP` stream: a reservation, or a circuit until its end.

        Args:
            relayed: it comes through a relay itself; such are refused, as the specification wants.
        """
        messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
        caller = stream.remote_peer
        with trio.move_on_after(ASK_S) as scope:
            data = await messages.read_message()
        if scope.cancelled_caught or data is None:
            return
        try:
            request = HopMessage.FromString(data)
        except DecodeError:
            raise RemoteProtocolError("a relay request that does not decode", caller) from None
        if relayed:
            await _answer(messages, Status.PERMISSION_DENIED)
        elif request.type == HopMessage.RESERVE:
            await self._reserve(messages, caller)
        elif request.type == HopMessage.CONNECT:
            await self._connect(messages, caller, request.peer.id)
        else:
            await _answer(messages, Status.UNEXPECTED_MESSAGE)

    async def _reserve(self, messages: MessageStream, caller: PeerId) -> None:
        now = trio.current_time()
        self._places = {peer: end for peer, end in self._places.items() if end > now and self._is_connected(peer)}
        full = len(self._places) >= self.limits.slots or self._has_share(caller, self._places, self.limits.slots)
        if caller not in self._places and full:
            await _answer(messages, Status.RESERVATION_REFUSED)
            return
        self._places[caller] = now + self.limits.reservation_s
        reply = HopMessage(type=HopMessage.STATUS, status=Status.OK)
        reply.reservation.expire = int(time.time()) + self.limits.reservation_s
        reply.reservation.addrs.extend(Multiaddr(addr).to_bytes() for addr in self._addrs())
        terms = LibraryLimits(
            duration=self.limits.circuit_s,
            data=self.limits.circuit_bytes,
            max_circuit_conns=self.limits.circuits_per_peer,
            max_reservations=self.limits.slots,
            reservation_ttl=self.limits.reservation_s,
        )
        reply.reservation.voucher = Reservation(ID.from_base58(caller), terms, self._host).voucher
        self._set_limit(reply)
        await messages.write_message(reply.SerializeToString())
        log.info("peer …%s has a place at this relay", caller[-6:])

    def _has_share(self, caller: PeerId, holders: Iterable[PeerId], most: int) -> bool:
        """Whether those who come from the caller's address hold all that one address may hold."""
        house = self._house_of(caller)
        if house is None:
            return False
        return sum(self._house_of(peer) == house for peer in holders) >= max(1, most // SHARE)

    async def _connect(self, messages: MessageStream, caller: PeerId, raw_target: bytes) -> None:
        target = PeerId(ID(raw_target[:MAX_PEER_ID_BYTES]).to_base58())  # who has a longer name, has no place here
        if self._places.get(target, 0.0) < trio.current_time() or not self._is_connected(target):
            await _answer(messages, Status.NO_RESERVATION)
            return
        if (
            self.circuits >= self.limits.circuits
            or self._circuits[caller] >= self.limits.circuits_per_peer
            or self._has_share(caller, list(self._circuits.elements()), self.limits.circuits)
        ):
            await _answer(messages, Status.RESOURCE_LIMIT_EXCEEDED)
            return
        self._circuits[caller] += 1
        try:
            limit = CircuitLimit(self.limits.circuit_s, self.limits.circuit_bytes)
            try:
                with trio.fail_after(ASK_S):
                    called = await announce(await self._open_stop(target), ID.from_base58(caller), limit)
            except (RemoteError, trio.TooSlowError) as error:
                log.debug("…%s does not take a call: %r", target[-6:], error)
                await _answer(messages, Status.CONNECTION_FAILED)
                return
            await self._join(messages, called)
        finally:
            self._circuits[caller] -= 1
            self._circuits += Counter()  # forgets zeros

    async def _join(self, caller: MessageStream, called: MessageStream) -> None:
        left = [self.limits.circuit_bytes or math.inf]
        ended_well = False
        try:
            reply = HopMessage(type=HopMessage.STATUS, status=Status.OK)
            self._set_limit(reply)
            await caller.write_message(reply.SerializeToString())
            with trio.move_on_after(self.limits.circuit_s or math.inf) as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._copy, caller, called, left)
                    nursery.start_soon(self._copy, called, caller, left)
            ended_well = not scope.cancelled_caught
        except* RemoteError as group:
            log.debug("a circuit broke: %s", group.exceptions[0])
        finally:
            with shielded_for(GOODBYE_S):
                for end in (caller, called):
                    await (end.close() if ended_well else end.reset())

    async def _copy(self, source: MessageStream, sink: MessageStream, left: list[float]) -> None:
        while data := await source.read_some(_PIECE_BYTES):
            left[0] -= len(data)
            if left[0] <= 0:
                raise RemoteError("the circuit's bytes are used up")
            if self._bucket is not None:
                await trio.sleep(self._bucket.take(len(data), trio.current_time()))
            await sink.stream.write(data)
            self.passed_bytes += len(data)
        await sink.close_write()

    def _set_limit(self, reply: HopMessage) -> None:
        if self.limits.circuit_s or self.limits.circuit_bytes:
            reply.limit.duration, reply.limit.data = self.limits.circuit_s, self.limits.circuit_bytes


async def _answer(messages: MessageStream, status: int) -> None:
    reply = HopMessage(type=HopMessage.STATUS, status=status)  # type: ignore[arg-type]
    await messages.write_message(reply.SerializeToString())
    await messages.close_write()
