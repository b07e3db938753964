"""What a stranger can say on the wire: every decoder between a socket and the state of a session.

Each function takes one input. Only the exceptions that a decoder promises may stop it; any other comes out, and is a
bug found. Where two ways through a decoder must agree, that is checked too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import cache, partial
from typing import Any

from google.protobuf.message import DecodeError
from libp2p.crypto.keys import KeyPair
from libp2p.security.noise.pb import noise_pb2
from libp2p.security.noise.transport import Transport as NoiseTransport
from noise.connection import Keypair, NoiseConnection

from petals.peer.base.identity import create_identity
from petals.peer.membership.record_exchange import answer_info, fetch_record
from petals.peer.net.libp2p.swarm import _HANDSHAKE_ERRORS, NOISE_ID, new_noise_key_pair, upgrade
from petals.peer.net.wire.multistream import Dialler, Listener, proposal
from petals.peer.net.wire.muxer import MuxerConfig
from petals.peer.net.wire.noise import NoiseFraming
from petals.peer.net.wire.yamux import EventKind, YamuxLimits, YamuxSession
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import ProtocolViolation, RemoteProtocolError, SwarmError
from petals.protocols.framing import FrameDecoder
from petals.protocols.tensors import BOOL, FLOATS, INT64, MAX_TENSOR_BYTES, check_header, decode_tensor
from petals.protocols.types import ModelId, PeerId
from tests.fuzz.loop import STRANGER, played, the_loop

MAX_FRAME = 1 << 16
MAX_PAYLOAD = 1 << 20
"""Tensors up to this are really made."""


def slices(data: bytes, seed: int) -> Iterator[bytes]:
    """`data` cut into pieces of uneven sizes, as networks do."""
    position = 0
    while position < len(data):
        size = 1 + (seed * 2654435761 + position * 40503) % 97
        yield data[position : position + size]
        position += size


# -- frames, negotiation, ciphers, streams ---------------------------------------------------------------------------


def frames(data: bytes) -> None:
    """Messages with a length in front: the same ones, however the network cut them."""

    def cut(pieces: Iterator[bytes]) -> tuple[list[bytes], str]:
        decoder, found = FrameDecoder(MAX_FRAME), []
        try:
            for piece in pieces:
                decoder.receive_data(piece)
                while (frame := decoder.next_frame()) is not None:
                    assert len(frame) <= MAX_FRAME
                    found.append(frame)
        except ProtocolViolation as violation:
            return found, str(violation)
        rest = decoder.take_rest(7)
        decoder.put_back(rest)
        assert decoder.take_rest(7) == rest
        return found, ""

    whole, pieces = cut(iter([data])), cut(slices(data, len(data)))
    assert whole == pieces


def multistream(data: bytes) -> None:
    """Both ends of the negotiation."""
    for machine in (Listener({"/petals/info/1.0.0", "/ipfs/ping/1.0.0"}), Dialler("/petals/info/1.0.0")):
        with suppress(ProtocolViolation):
            for piece in slices(data, 1):
                machine.receive_data(piece)
                if (machine.chosen() if isinstance(machine, Listener) else machine.agreed()) is not None:
                    break
                assert machine.wanted() >= 0
        if isinstance(machine, Listener):
            assert len(machine.take_output()) < 2048


def noise(data: bytes) -> None:
    """Ciphertext of a stranger, and our own with one of its bytes changed."""
    key = bytes(32)
    with suppress(ProtocolViolation):
        _, used = NoiseFraming(key, key).decrypt(memoryview(data))
        assert used <= len(data)
    wire = bytearray(b"".join(NoiseFraming(key, key).encrypt(list(slices(data, 3)))))
    plaintexts, used = NoiseFraming(key, key).decrypt(memoryview(wire))
    assert b"".join(plaintexts) == data
    assert used == len(wire)
    if wire:
        wire[len(data) * 7 % len(wire)] ^= 1 + len(data) % 255
        with suppress(ProtocolViolation):
            plaintexts, _ = NoiseFraming(key, key).decrypt(memoryview(wire))
            assert len(b"".join(plaintexts)) < len(data), "a changed message was believed"


def yamux(data: bytes) -> None:
    """A whole session; the first byte says how its streams are treated."""
    limits = YamuxLimits(max_streams=8, buffer_bytes=512 << 10, max_window=1 << 20)
    session = YamuxSession(is_client=bool(data[:1] and data[0] & 1), limits=limits)
    ours = session.open_stream()
    manner = data[0] >> 1 if data else 0
    alive = [ours]
    with suppress(ProtocolViolation):
        for index, piece in enumerate(slices(data[1:], manner)):
            for event in session.receive_data(piece):
                if event.kind is EventKind.OPENED:
                    assert event.stream is not None
                    alive.append(event.stream)
            stream = alive[index % len(alive)]
            match (manner + index) % 5:
                case 0:
                    session.read(stream, 1 + manner)
                case 1 if not stream.local_closed and not stream.reset:
                    session.write(stream, memoryview(b"answer"))
                case 2 if manner & 16:
                    session.close_write(stream)
                case 3 if manner & 32:
                    session.reset(stream)
                case 4 if manner & 8:
                    session.close_read(stream, float(index))
                    session.expire(float(index) - 2)
            if index % 3 == 0:
                session.take_output()
            held = list({id(each): each for each in (*alive, *session.streams.values())}.values())
            assert session.buffered == sum(each.inbox_bytes for each in held) <= limits.buffer_bytes
            assert session.granted == sum(each.target_window for each in session.streams.values())
            assert len(session.streams) <= 2 * limits.max_streams
            assert session.output_bytes <= (2 << 20)


class _Played:
    """A raw connection whose other end has said all it will say."""

    def __init__(self, data: bytes) -> None:
        self._left = data
        self.is_initiator = False
        self.said = b""

    async def read(self, n: int | None = None) -> bytes:
        taken, self._left = self._left[:n], self._left[len(self._left[:n]) :]
        return taken

    async def write(self, data: bytes) -> None:
        self.said += data

    async def close(self) -> None: ...

    def get_remote_address(self) -> tuple[str, int]:
        return "127.0.0.1", 1


@cache
def _noise_transport() -> tuple[KeyPair, NoiseTransport]:
    key_pair = create_identity().key_pair
    return key_pair, NoiseTransport(key_pair, noise_privkey=new_noise_key_pair().private_key)


class _Initiator(_Played):
    """Shakes hands as it should; only what it says about who it is, is the fuzzer's."""

    def __init__(self, payload: bytes) -> None:
        super().__init__(proposal(NOISE_ID))
        self._payload: bytes | None = payload
        self._noise = NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256")
        self._noise.set_as_initiator()
        self._noise.set_keypair_from_private_bytes(Keypair.STATIC, new_noise_key_pair().private_key.to_bytes())
        self._noise.start_handshake()
        self._send(self._noise.write_message())

    async def write(self, data: bytes) -> None:
        self.said += data
        answer = self.said.removeprefix(proposal(NOISE_ID))
        size = int.from_bytes(answer[:2], "big")
        if self._payload is not None and len(answer) > 2 and len(answer) >= 2 + size:
            self._noise.read_message(bytes(answer[2 : 2 + size]))
            self._send(self._noise.write_message(self._payload))
            self._payload = None

    def _send(self, message: bytes) -> None:
        self._left += len(message).to_bytes(2, "big") + message


def handshake(data: bytes) -> None:
    """A stranger's first bytes; and, in a correct Noise handshake, whatever it says about who it is."""

    async def shake(raw: Any) -> None:
        with suppress(*_HANDSHAKE_ERRORS):
            await upgrade(
                raw,
                _noise_transport()[1],
                expected=None,
                is_client=False,
                on_stream=lambda _: None,
                config=MuxerConfig(),
            )

    the_loop().run(partial(shake, _Played(data)))
    if len(data) < 60_000:
        the_loop().run(partial(shake, _Initiator(data)))


def handshake_seeds() -> list[bytes]:
    """Payloads as an honest initiator sends them, though not signed for this handshake."""
    key_pair, _ = _noise_transport()
    payload = noise_pb2.NoiseHandshakePayload(
        identity_key=key_pair.public_key.serialize(),
        identity_sig=key_pair.private_key.sign(b"noise-libp2p-static-key:"),
    )
    return [payload.SerializeToString(), proposal(NOISE_ID) + bytes([0, 32]) + bytes(32)]


# -- tensors ---------------------------------------------------------------------------------------------------------


def tensors(data: bytes) -> None:
    """A header and its payload, for each kind of tensor that anybody asks for."""
    try:
        header = pb.Tensor.FromString(data[1 : 1 + data[0]] if data else b"")
    except DecodeError:  # protobuf's own; `parse` turns it into ours
        return
    payload = data[1 + data[0] :] if data else b""
    for shape, dtypes in (((None, None, None), FLOATS), ((2, None), BOOL), ((None,), INT64), ((1, None, 32), FLOATS)):
        try:
            size = check_header(header, name="fuzzed", shape=shape, dtypes=dtypes)
        except RemoteProtocolError:
            continue
        assert 0 < size <= MAX_TENSOR_BYTES
        if size <= MAX_PAYLOAD:
            buffer = bytearray((payload * (1 + size // max(1, len(payload))))[:size] or bytes(size))
            tensor = decode_tensor(header, buffer.ljust(size, b"\0"))
            assert tensor.shape == tuple(header.shape)
            assert tensor.dtype in dtypes


# -- who are you -----------------------------------------------------------------------------------------------------


def info(data: bytes) -> None:
    """The question, at a server; the answer, at a client."""

    async def asked() -> None:
        ours, _ = await played(data)
        with suppress(SwarmError):
            await answer_info(lambda digest: [b"record"] if digest else [], ours)

    class Host:
        async def open_stream(self, peer_id: PeerId, protocol: str, *, addrs: object = ()) -> object:
            return (await played(data))[0]

    async def answered() -> None:
        host: Any = Host()
        with suppress(SwarmError):
            await fetch_record(host, STRANGER, (), ModelId("m", "ab" * 32))

    the_loop().run(asked)
    the_loop().run(answered)
