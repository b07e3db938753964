"""Nonsense from one peer costs it one stream with a typed error; nobody else notices."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
import torch
import trio

from petals.peer.client.session.session import RemoteSession
from petals.peer.node import Peer
from petals.protocols import messages_pb2 as pb
from petals.protocols.framing import encode_frame
from petals.protocols.inference import INFERENCE_V1, MAX_MESSAGE_BYTES
from petals.protocols.stream import MessageStream
from petals.protocols.tensors import encode_tensor
from petals.protocols.training import FORWARD_V1
from tests.swarm.conftest import Swarm, Truth, all_leases_returned


@dataclass
class Stage:
    """A server, an honest client in the middle of a session, and a stranger."""

    server: Peer
    stranger: Peer
    session: RemoteSession
    hidden: torch.Tensor
    expected: torch.Tensor

    def opening(self, **changes: object) -> pb.InferenceRequest:
        assert self.server.server is not None
        fields: dict[str, object] = {
            "session_id": secrets.token_bytes(16),
            "model_digest": self.server.server.model.digest,
            "start_block": 0,
            "end_block": 4,
            "batch_size": 1,
            "max_length": 16,
        }
        return pb.InferenceRequest(open=pb.Open(**(fields | changes)))  # type: ignore[arg-type]

    async def stream(self, protocol: str = INFERENCE_V1) -> MessageStream:
        stream = await self.stranger.host.open_stream(self.server.peer_id, protocol, addrs=self.server.addrs)
        return MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)

    async def opened(self) -> MessageStream:
        messages = await self.stream()
        await messages.write_message(self.opening().SerializeToString())
        assert (await self.reply(messages)).WhichOneof("kind") == "opened"
        return messages

    @staticmethod
    async def reply(messages: MessageStream) -> pb.InferenceReply:
        with trio.fail_after(20):
            data = await messages.read_message()
        assert data is not None, "the stream ended without a word"
        return pb.InferenceReply.FromString(data)

    async def is_unmoved(self) -> None:
        """The honest session goes on, exactly."""
        with trio.fail_after(20):
            torch.testing.assert_close(await self.session.step(self.hidden), self.expected)
        self.session.rollback(3)


@pytest.fixture
async def stage(make_swarm: Callable[..., Swarm], tiny_truth: Truth, nursery: trio.Nursery) -> AsyncIterator[Stage]:
    swarm = make_swarm(tiny_truth.directory)
    server = await swarm.add(range(4), max_sessions_per_peer=4, max_batch_tokens=64)
    client = await (await swarm.add()).client()
    stranger = await swarm.add()
    session = await client.open_session(client.blocks, 1, 16)
    hidden = torch.randn(1, 4, client.checkpoint.hidden_size, generator=torch.Generator().manual_seed(0))
    await session.step(hidden[:, :3])
    expected = await session.step(hidden[:, 3:])
    session.rollback(3)
    yield Stage(server, stranger, session, hidden[:, 3:], expected)
    await session.close()
    await all_leases_returned(server)


def step(tensor: torch.Tensor, **changes: object) -> tuple[bytes, list[memoryview]]:
    header, payload = encode_tensor(tensor)
    fields: dict[str, object] = {"step_id": 0, "position": 0, "hidden": header}
    return pb.InferenceRequest(step=pb.Step(**(fields | changes))).SerializeToString(), payload  # type: ignore[arg-type]


async def test_requests_that_can_not_be_served(stage: Stage) -> None:
    for changes, code in (
        ({"model_digest": "00" * 32}, pb.UNKNOWN_MODEL),
        ({"end_block": 5}, pb.BLOCKS_NOT_HELD),
        ({"adapter": "somebody/else"}, pb.UNSUPPORTED),
        ({"batch_size": 1024, "max_length": 1 << 20}, pb.QUOTA),
        ({"session_id": b"short"}, pb.MALFORMED),
        ({"start_block": 3, "end_block": 3}, pb.MALFORMED),
        ({"max_length": 0}, pb.MALFORMED),
    ):
        messages = await stage.stream()
        await messages.write_message(stage.opening(**changes).SerializeToString())
        assert (await stage.reply(messages)).error.code == code, changes
        assert await messages.read_message() is None
    await stage.is_unmoved()


async def test_bytes_that_are_no_message(stage: Stage) -> None:
    for garbage in (encode_frame(b"\xff" * 40), encode_frame(b""), encode_frame(bytes(MAX_MESSAGE_BYTES + 1))[:99]):
        messages = await stage.stream()
        await messages.stream.write(garbage)
        assert (await stage.reply(messages)).error.code in (pb.MALFORMED, pb.OUT_OF_ORDER)
    await stage.is_unmoved()


async def test_steps_that_do_not_fit(stage: Stage) -> None:
    size = stage.hidden.shape[-1]
    giant = pb.Tensor(dtype=pb.FLOAT32, shape=[1, 4, 2**31])
    for (message, payload), code in (
        (step(torch.zeros(1, 1, size), step_id=1), pb.OUT_OF_ORDER),
        (step(torch.zeros(1, 1, size), position=1), pb.OUT_OF_ORDER),
        (step(torch.zeros(1, 17, size)), pb.MALFORMED),
        (step(torch.zeros(1, 1, size + 1)), pb.MALFORMED),
        (step(torch.zeros(2, 1, size)), pb.MALFORMED),
        (step(torch.zeros(1, 1, size, dtype=torch.int64)), pb.MALFORMED),
        (step(torch.zeros(1, 1, size), hidden=giant), pb.MALFORMED),
    ):
        messages = await stage.opened()
        await messages.write_message(message, *payload)
        assert (await stage.reply(messages)).error.code == code
    await stage.is_unmoved()


async def test_hypo_ids_that_name_no_row(stage: Stage) -> None:
    messages = await stage.opened()
    rows = torch.tensor([7])
    header, more = encode_tensor(rows)
    message, payload = step(torch.zeros(1, 1, stage.hidden.shape[-1]), hypo_ids=header)
    await messages.write_message(message, *payload, *more)
    assert (await stage.reply(messages)).error.code == pb.MALFORMED
    await stage.is_unmoved()


async def test_one_peer_can_not_have_all_sessions(stage: Stage) -> None:
    open_ones = [await stage.opened() for _ in range(4)]
    messages = await stage.stream()
    await messages.write_message(stage.opening().SerializeToString())
    assert (await stage.reply(messages)).error.code == pb.QUOTA
    await stage.is_unmoved()
    for each in open_ones:
        await each.reset()


async def test_the_id_of_an_open_session_is_taken(stage: Stage) -> None:
    """Else a stranger who learns it could take the pushes that are meant for it."""
    known = stage.session.hops[0].session_id
    messages = await stage.stream()
    await messages.write_message(stage.opening(session_id=known).SerializeToString())
    assert (await stage.reply(messages)).error.code == pb.MALFORMED
    await stage.is_unmoved()


async def test_half_a_payload_and_silence_holds_nobody_up(stage: Stage) -> None:
    messages = await stage.opened()
    message, payload = step(torch.zeros(1, 8, stage.hidden.shape[-1]))
    await messages.stream.write(encode_frame(message) + bytes(payload[0])[:10])
    await stage.is_unmoved()
    await messages.reset()


async def test_training_requests_that_do_not_fit(stage: Stage) -> None:
    assert stage.server.server is not None
    digest, size = stage.server.server.model.digest, stage.hidden.shape[-1]
    for shape, blocks, code in (
        ((1, 65, size), (0, 4), pb.TOO_LONG),
        ((1, 1, size + 1), (0, 4), pb.MALFORMED),
        ((1, 1, size), (0, 9), pb.BLOCKS_NOT_HELD),
        ((1, 1, size), (2, 1), pb.MALFORMED),
    ):
        header, payload = encode_tensor(torch.zeros(shape))
        request = pb.TrainingRequest(model_digest=digest, start_block=blocks[0], end_block=blocks[1], hidden=header)
        messages = await stage.stream(FORWARD_V1)
        await messages.write_message(request.SerializeToString(), *payload)
        with trio.fail_after(20):
            data = await messages.read_message()
        assert data is not None
        assert pb.TrainingReply.FromString(data).error.code == code
    await stage.is_unmoved()
