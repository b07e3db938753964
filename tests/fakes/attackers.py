"""Strangers who mean harm, over real connections. Each attack runs until it is cancelled, or has done `count` of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import trio
from libp2p.crypto.x25519 import create_new_key_pair as new_noise_key_pair
from libp2p.io.trio import TrioTCPStream
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.transport import Transport as NoiseTransport
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.dht.keys import record_key, swarm_key
from petals.dht.records import ServerRecord, ServerState, sign_record
from petals.peer.base.identity import Identity, create_identity
from petals.peer.net.host import Host, HostConfig, open_host
from petals.peer.net.libp2p.swarm import tcp_endpoint, upgrade
from petals.peer.net.wire.muxer import MuxedStream, MuxerConfig
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import RemoteError
from petals.protocols.framing import encode_frame, encode_varint
from petals.protocols.inference import INFERENCE_V1, MAX_MESSAGE_BYTES
from petals.protocols.push import PUSH_V1
from petals.protocols.stream import MessageStream
from petals.protocols.tensors import encode_tensor
from petals.protocols.training import BACKWARD_V1, FORWARD_V1
from petals.protocols.types import ModelId, PeerId

PROTOCOLS = (INFERENCE_V1, PUSH_V1, "/petals/info/1.0.0", "/ipfs/ping/1.0.0", str(PROTOCOL_ID))


@dataclass(frozen=True)
class Target:
    """Who is attacked."""

    peer_id: PeerId
    addr: str
    model: ModelId
    hidden_size: int
    blocks: int = 4

    @property
    def endpoint(self) -> tuple[str, int]:
        return tcp_endpoint(Multiaddr(self.addr))


@dataclass
class Attacker:
    """One identity with a real host, and the target it knows. `done` counts what it has got away with."""

    identity: Identity
    host: Host
    target: Target
    done: dict[str, int] = field(default_factory=dict)

    def note(self, what: str) -> None:
        self.done[what] = self.done.get(what, 0) + 1

    async def stream(self, protocol: str) -> MessageStream:
        stream = await self.host.open_stream(self.target.peer_id, protocol, addrs=[self.target.addr])
        return MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)

    def opening(self, max_length: int = 16) -> bytes:
        """A session that the target would open."""
        opening = pb.Open(
            session_id=secrets.token_bytes(16), model_digest=self.target.model.digest, end_block=self.target.blocks,
            batch_size=1, max_length=max_length,
        )  # fmt: skip
        return pb.InferenceRequest(open=opening).SerializeToString()

    def step(self, step_id: int = 0, position: int = 0, tokens: int = 1) -> tuple[bytes, bytes]:
        """A message and its payload."""
        header, payload = encode_tensor(torch.zeros(1, tokens, self.target.hidden_size))
        step = pb.Step(step_id=step_id, position=position, hidden=header)
        return pb.InferenceRequest(step=step).SerializeToString(), b"".join(payload)

    # -- attacks -------------------------------------------------------------------------------------------------------

    async def slow_loris(self, pause_s: float = 0.02) -> None:
        """A session whose every byte comes alone; then half a payload, and silence."""
        messages = await self.stream(INFERENCE_V1)
        for byte in encode_frame(self.opening()):
            await messages.stream.write(bytes([byte]))
            self.note("loris bytes")
            await trio.sleep(pause_s)
        message, payload = self.step(tokens=8)
        await messages.stream.write(encode_frame(message) + payload[: len(payload) // 2])
        await trio.sleep_forever()

    async def silence(self, protocol: str) -> None:
        """A stream that says nothing."""
        await self.stream(protocol)
        self.note("silent streams")
        await trio.sleep_forever()

    async def half_a_handshake(self) -> None:
        """A socket that begins, and stops."""
        host, port = self.target.endpoint
        async with await trio.open_tcp_stream(host, port) as stream:
            await stream.send_all(b"\x13/multistream/")
            self.note("half handshakes")
            await trio.sleep_forever()

    async def huge_sizes(self) -> None:
        """Lengths that nobody could ever send, in every protocol, and tensors of terabytes."""
        for protocol in PROTOCOLS:
            for size in (MAX_MESSAGE_BYTES + 1, 1 << 31, (1 << 62) + 5):
                with suppress(RemoteError):
                    messages = await self.stream(protocol)
                    await messages.stream.write(encode_varint(size) + bytes(100))
                    self.note("huge sizes")
                    await messages.reset()
        messages = await self.stream(INFERENCE_V1)
        await messages.write_message(self.opening())
        await messages.read_message()
        hidden = pb.Tensor(dtype=pb.FLOAT32, shape=[1, 4, (1 << 32) - 1])
        await messages.write_message(pb.InferenceRequest(step=pb.Step(hidden=hidden)).SerializeToString())
        reply = pb.InferenceReply.FromString(await messages.read_message() or b"")
        assert reply.error.code == pb.MALFORMED
        await messages.reset()

    async def out_of_order(self) -> None:
        """Steps that are not next, of sessions that are opened for each."""
        for step_id, position in ((1, 0), (0, 3), (7, 7), ((1 << 63), 1)):
            messages = await self.stream(INFERENCE_V1)
            await messages.write_message(self.opening())
            await messages.read_message()
            await messages.write_message(*self.step(step_id, position))
            reply = pb.InferenceReply.FromString(await messages.read_message() or b"")
            assert reply.error.code == pb.OUT_OF_ORDER
            self.note("steps out of order")
            await messages.reset()

    async def guess_sessions(self, count: int) -> None:
        """Pushes into sessions whose names are guessed."""
        header, payload = encode_tensor(torch.full((1, 1, self.target.hidden_size), 1e9))
        for _ in range(count):
            with suppress(RemoteError):
                messages = await self.stream(PUSH_V1)
                push = pb.Push(session_id=secrets.token_bytes(16), hidden=header)
                await messages.write_message(push.SerializeToString(), *payload)
                await messages.close()
                self.note("guesses")

    async def exhaust_cache(self, max_length: int, count: int) -> None:
        """As many and as long sessions as are let in, and never a step."""
        for _ in range(count):
            messages = await self.stream(INFERENCE_V1)
            await messages.write_message(self.opening(max_length))
            reply = pb.InferenceReply.FromString(await messages.read_message() or b"")
            self.note(f"cache {reply.WhichOneof('kind')}")
        await trio.sleep_forever()

    async def train(self, tokens: int, *, backward: bool, extras: bool = False) -> None:
        """One forward or backward request of one row, as long as is allowed; extras: padding, prompts and factors."""
        hidden = self.target.hidden_size
        sent = {"hidden": torch.randn(1, tokens, hidden)}
        if extras:
            sent["attention_mask"] = torch.arange(tokens).expand(1, -1) >= tokens // 8
            sent["prompts"] = torch.randn(self.target.blocks, 1, tokens // 4, hidden)
        if backward:
            sent["grad_output"] = torch.randn(1, tokens, hidden)
        request = pb.TrainingRequest(model_digest=self.target.model.digest, end_block=self.target.blocks)
        payload: list[memoryview] = []
        for name, tensor in sent.items():
            _, pieces = encode_tensor(tensor, header=getattr(request, name))
            payload += pieces
        if extras:
            a, b = torch.randn(8, hidden), torch.randn(hidden, 8)
            factors = pb.LowRank(block=0, path="self_attn.q_proj", scaling=0.1)
            for factor, header in ((a, factors.a), (b, factors.b)):
                payload += encode_tensor(factor, header=header)[1]
            request.lora.append(factors)
        messages = await self.stream(BACKWARD_V1 if backward else FORWARD_V1)
        await messages.write_message(request.SerializeToString(), *payload)
        reply = pb.TrainingReply.FromString(await messages.read_message() or b"")
        self.note(f"training {reply.WhichOneof('kind')}")
        await messages.reset()

    async def half_sent(self, tokens: int, count: int) -> None:
        """Training requests whose payload stops before its last byte."""
        for _ in range(count):
            messages = await self.stream(FORWARD_V1)
            header, payload = encode_tensor(torch.zeros(1, tokens, self.target.hidden_size))
            request = pb.TrainingRequest(
                model_digest=self.target.model.digest, end_block=self.target.blocks, hidden=header
            )
            await messages.write_message(request.SerializeToString())
            with trio.move_on_after(2):  # a refusal is not read; what is refused is not taken for ever
                await messages.stream.write(payload[0][:-1])
            self.note("half-sent requests")
        await trio.sleep_forever()

    async def fill_mailbox(self, tokens: int, count: int) -> None:
        """Pushes to sessions of its own, which ask for no step."""
        for _ in range(count):
            opening = pb.InferenceRequest.FromString(self.opening(tokens))
            session = await self.stream(INFERENCE_V1)
            await session.write_message(opening.SerializeToString())
            await session.read_message()
            header, payload = encode_tensor(torch.zeros(1, tokens, self.target.hidden_size))
            for step_id in range(2):
                messages = await self.stream(PUSH_V1)
                push = pb.Push(session_id=opening.open.session_id, step_id=step_id, hidden=header)
                with suppress(RemoteError):
                    await messages.write_message(push.SerializeToString(), *payload)
                    await messages.close()
                    self.note("pushes")
        await trio.sleep_forever()

    async def flood_records(self, count: int) -> None:
        """Records and provider entries of models that do not exist, by one key, and fat ones for the one that does."""
        address = Multiaddr("/ip4/127.0.0.1/tcp/1").to_bytes()
        fat = encode_varint(400) + encode_varint(60_000) + b"/" + b"x" * 59_999  # a socket's name of 60,000 bytes
        for number in range(count):
            digest = secrets.token_hex(32) if number % 4 else self.target.model.digest
            model, me = ModelId("none", digest), ID.from_base58(self.identity.peer_id).to_bytes()
            now = time.time()
            record = ServerRecord(
                model=model, peer_id=self.identity.peer_id, blocks=range(4), state=ServerState.ONLINE,
                sequence=number, issued_at=now, expires_at=now + 60,
            )  # fmt: skip
            key = record_key(model, self.identity.peer_id).encode()
            value = sign_record(record, self.identity.sign, self.identity.public_key)
            put = Message(type=Message.MessageType.PUT_VALUE, key=key, record=Record(key=key, value=value))
            provide = Message(type=Message.MessageType.ADD_PROVIDER, key=bytes.fromhex(swarm_key(model)))
            provide.providerPeers.add(id=me, addrs=[address, *[fat] * (40 if number % 16 == 0 else 3)])
            for message in (put, provide):
                with suppress(RemoteError):
                    messages = await self.stream(str(PROTOCOL_ID))
                    await messages.write_message(message.SerializeToString())
                    await messages.close()
                    self.note("records")

    async def reset_storm(self, count: int) -> None:
        """Streams that are opened and taken back at once: one by one, and in bursts that arrive in one piece."""
        await self.host.connect(self.target.addr)
        target = ID.from_base58(self.target.peer_id)
        for number in range(count):
            try:
                stream = await self.host.open_stream(self.target.peer_id, PROTOCOLS[number % len(PROTOCOLS)])
                await stream.reset()
                conn: Any = self.host._network.live_conn(target)
                for _ in range(100 if conn is not None else 0):
                    conn.muxed_conn.connection.open_stream().reset_nowait()
                    self.note("resets")
            except RemoteError:
                self.note("cut off")
                await self.host.connect_peer(self.target.peer_id, [self.target.addr])
            await trio.lowlevel.checkpoint()


async def run_attacker(
    target: Target, attack: Callable[[Attacker], Awaitable[None]], attackers: list[Attacker] | None = None
) -> None:
    """A new identity that attacks; what it is told or cut off with is its own affair."""
    identity = create_identity()
    async with open_host(identity.key_pair, HostConfig(listen=())) as host:
        attacker = Attacker(identity, host, target)
        if attackers is not None:
            attackers.append(attacker)
        with suppress(RemoteError):
            await attack(attacker)


async def idle_connection(target: Target, opened: Callable[[bool], None]) -> None:
    """One more identity that connects, and says nothing; `opened` is told whether it was let in, and when it is out."""
    host, port = target.endpoint
    identity = create_identity()
    noise = NoiseTransport(identity.key_pair, noise_privkey=new_noise_key_pair().private_key)
    try:
        raw = RawConnection(TrioTCPStream(await trio.open_tcp_stream(host, port)), True)
        expected = ID.from_base58(target.peer_id)

        def refuse(stream: MuxedStream) -> None:
            stream.reset_nowait()

        _, connection = await upgrade(
            raw, noise, expected=expected, is_client=True, on_stream=refuse, config=MuxerConfig()
        )
    except Exception:  # the handshake of a stranger who is turned away: any of four libraries says so in its own way
        opened(False)
        return
    opened(True)
    await connection.run()
    opened(False)
