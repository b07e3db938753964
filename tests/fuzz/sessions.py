"""What a stranger can ask of a server, and a server answer a client: whole streams through the code that serves them.

The server is real but for its lane, which computes at once, and its host; so is its model of four tiny blocks.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import trio

from petals.models.blocks.block import BlockSpan
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from petals.peer.base.config import ServeConfig, Timeouts
from petals.peer.base.identity import signer_of
from petals.peer.client.hops.hop import Hop, SessionSpec, StepInput
from petals.peer.engine.admission import Admission
from petals.peer.engine.cache_budget import CacheBudget
from petals.peer.engine.endpoint import Inbound
from petals.peer.engine.push_sender import Pusher
from petals.peer.engine.quotas import Rates
from petals.peer.engine.throughput import Speedometer, Throughput
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import PeerUnreachable, SwarmError
from petals.protocols.framing import encode_frame
from petals.protocols.stream import ByteStream
from petals.protocols.tensors import encode_tensor
from petals.protocols.types import ModelId, PeerId
from tests.fakes.memory_swarm import InlineLane
from tests.fuzz.loop import STRANGER, played, the_loop
from tests.models.tiny import CASES, HIDDEN, save_tiny

MODEL = ModelId("fuzzed", "ab" * 32)
SESSION = bytes(range(16))


class _Nobody:
    """A host that reaches no one."""

    peer_id = PeerId("self")

    async def open_stream(self, peer_id: PeerId, protocol: str, *, addrs: object = ()) -> ByteStream:
        raise PeerUnreachable("nobody there", peer_id)

    def plausible(self, namer: PeerId, addrs: Sequence[str]) -> tuple[str, ...]:
        return tuple(addrs)


class _Instant(InlineLane):
    async def submit(self, priority: object, work: Callable[[], Any], **_: Any) -> Any:
        with trio.CancelScope(shield=True):
            return await super().submit(priority, work)  # type: ignore[arg-type]


@cache
def span() -> BlockSpan:
    """Four tiny blocks."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        save_tiny(next(case for case in CASES if case.id == "llama"), Path(directory))
        return load_span(open_checkpoint(directory), range(4))


@cache
def server() -> Inbound:
    """What answers."""
    lane: Any = _Instant(random.Random(0))
    lane._dice = random.Random(0)
    lane._dice.uniform = lambda low, high: 0.0
    speed = Speedometer(Throughput(1.0, 1.0), fixed=True)
    host: Any = _Nobody()
    config = ServeConfig(
        cache_bytes=1 << 22, max_wait_s=0.0, max_batch_tokens=256, max_lora_bytes=1 << 20, prefix_idle_s=60.0
    )
    admission = Admission(PeerId("server"), MODEL.digest, verify=signer_of, clock=time.time)
    rates = Rates(None, None, frozenset(), lambda: 0.0)
    return Inbound(
        MODEL, span(), lane, CacheBudget(config.cache_bytes), config, admission, rates, speed=speed, pusher=Pusher(host)
    )


def _ask(data: bytes, answer: Callable[[Inbound, ByteStream], Any]) -> None:
    async def asked() -> None:
        ours, theirs = await played(data)
        with suppress(SwarmError):
            await answer(server(), ours)
        await ours.close()
        await theirs.close()

    the_loop().run(asked)
    inbound = server()
    assert not inbound.sessions
    assert not inbound._mailboxes
    assert inbound.budget.left_bytes == inbound.budget.total_bytes
    assert inbound.work.left_bytes == inbound.work.total_bytes


def inference(data: bytes) -> None:
    """All that a client says in one session."""
    _ask(data, lambda inbound, stream: inbound.answer_inference(stream))


def training(data: bytes) -> None:
    """A forward or backward request; the first byte says which."""
    _ask(data[1:], lambda inbound, stream: inbound.answer_training(stream, backward=bool(data[:1] and data[0] & 1)))


def push(data: bytes) -> None:
    """Two pushes of different strangers to a session that waits for one."""

    async def pushed() -> None:
        inbound = server()
        opening = pb.Open(session_id=SESSION, start_block=0, end_block=4, batch_size=1, max_length=16)
        with inbound._mailbox(opening) as mailbox:
            for _ in range(2):
                ours, _ = await played(data)
                with suppress(SwarmError):
                    await inbound.answer_push(ours)
            assert len(mailbox._waiting) <= 2
        assert inbound.work.left_bytes == inbound.work.total_bytes

    the_loop().run(pushed)


def replies(data: bytes) -> None:
    """All that a server answers to a client's opening and two steps."""

    class Host(_Nobody):
        async def open_stream(self, peer_id: PeerId, protocol: str, *, addrs: object = ()) -> ByteStream:
            return (await played(data))[0]

    async def ask() -> None:
        host: Any = Host()
        spec = SessionSpec(model=MODEL, hidden_size=HIDDEN, batch_size=1, max_length=16, prefixes=(bytes(32),))
        with suppress(SwarmError):
            hop = await Hop.open(host, STRANGER, (), range(4), spec, Timeouts())
            for position in range(2):
                output = await hop.step(StepInput(position=position, hidden=torch.zeros(1, 1, HIDDEN)))
                assert output.hidden is not None
                assert output.hidden.shape == (1, 1, HIDDEN)
            await hop.close()

    the_loop().run(ask)


# -- what honest peers say --------------------------------------------------------------------------------------------


def _message(message: Any, *payload: memoryview) -> bytes:
    return encode_frame(message.SerializeToString()) + b"".join(payload)


def _opening(**changes: Any) -> tuple[pb.InferenceRequest, list[memoryview]]:
    fields = {"session_id": SESSION, "model_digest": MODEL.digest, "end_block": 4, "batch_size": 1, "max_length": 16}
    return pb.InferenceRequest(open=pb.Open(**{**fields, **changes})), []


def _step(step_id: int, position: int, tokens: int, batch: int = 1, **extras: torch.Tensor) -> bytes:
    generator = torch.Generator().manual_seed(step_id)
    header, payload = encode_tensor(torch.randn(batch, tokens, HIDDEN, generator=generator))
    step = pb.Step(step_id=step_id, position=position, hidden=header)
    for name, tensor in extras.items():
        header, more = encode_tensor(tensor)
        getattr(step, name).CopyFrom(header)
        payload += more
    return _message(pb.InferenceRequest(step=step), *payload)


def _lora() -> tuple[list[pb.LowRank], list[memoryview]]:
    a, pieces_a = encode_tensor(torch.ones(2, HIDDEN))
    b, pieces_b = encode_tensor(torch.ones(HIDDEN, 2))
    return [pb.LowRank(block=1, path="self_attn.q_proj", a=a, b=b, scaling=0.5)], pieces_a + pieces_b


def inference_seeds() -> list[bytes]:
    """Plain, batched with everything a step can carry, low-rank, rolled back, kept prefixes, pushed."""
    close = _message(pb.InferenceRequest(close=pb.Close(prefixes=[bytes(32)])))
    plain, _ = _opening()
    rich, _ = _opening(batch_size=2)
    layers, factors = _lora()
    tuned, _ = _opening(lora=layers)
    named, _ = _opening(max_length=64, prefixes=[bytes(32), bytes([1] * 32)])
    header, payload = encode_tensor(torch.zeros(1, 1, HIDDEN))
    pushed = pb.Step(
        step_id=0,
        hidden=header,
        pushed_by="stranger",
        push_to=pb.PushTo(peer_id="x", addrs=["/ip4/1.2.3.4/tcp/5"], session_id=SESSION),
    )
    everything = _step(
        0, 0, 3, 2,
        attention_mask=torch.tensor([[False, True, True], [True] * 3]), prompts=torch.ones(4, 2, 2, HIDDEN),
    ) + _step(1, 3, 1, 2, attention_mask=torch.ones(2, 4, dtype=torch.bool), hypo_ids=torch.tensor([1, 0]))  # fmt: skip
    return [
        _message(plain) + _step(0, 0, 3) + _step(1, 3, 1) + _step(2, 2, 1) + close,
        _message(rich) + everything + close,
        _message(tuned, *factors) + _step(0, 0, 2) + close,
        _message(named) + _step(0, 0, 40) + close,
        _message(plain) + _message(pb.InferenceRequest(step=pushed))
        + _message(pb.InferenceRequest(supply=pb.Supply(step_id=0, hidden=header)), *payload) + close,
    ]  # fmt: skip


def training_seeds() -> list[bytes]:
    """Forward and backward, plain and with prompts, mask and factors."""
    hidden, payload = encode_tensor(torch.ones(2, 3, HIDDEN))
    grad, grad_payload = encode_tensor(torch.ones(2, 3, HIDDEN), pb.AS_FLOAT16)
    mask, mask_payload = encode_tensor(torch.ones(2, 3, dtype=torch.bool))
    prompts, prompts_payload = encode_tensor(torch.ones(4, 2, 1, HIDDEN))
    layers, factors = _lora()
    forward = pb.TrainingRequest(model_digest=MODEL.digest, end_block=4, hidden=hidden)
    backward = pb.TrainingRequest(
        model_digest=MODEL.digest, end_block=4, hidden=hidden, attention_mask=mask, prompts=prompts, grad_output=grad,
        lora=layers, reply_encoding=pb.BLOCKWISE_INT8,
    )  # fmt: skip
    return [
        b"\0" + _message(forward, *payload),
        b"\1" + _message(backward, *payload, *mask_payload, *prompts_payload, *grad_payload, *factors),
    ]


def push_seeds() -> list[bytes]:
    """One that fits."""
    header, payload = encode_tensor(torch.ones(1, 2, HIDDEN))
    return [_message(pb.Push(session_id=SESSION, step_id=0, hidden=header), *payload)]


def replies_seeds() -> list[bytes]:
    """An opening and two answers, plain and short; errors."""
    opened = _message(pb.InferenceReply(opened=pb.Opened(dtype=pb.FLOAT32, cache_bytes=1 << 20)))
    seeds = []
    for encoding in (pb.RAW, pb.AS_FLOAT16, pb.BLOCKWISE_INT8):
        header, payload = encode_tensor(torch.ones(1, 1, HIDDEN), encoding)
        answers = [
            _message(pb.InferenceReply(step_done=pb.StepDone(step_id=step_id, hidden=header, queue_us=5)), *payload)
            for step_id in range(2)
        ]
        seeds.append(opened + b"".join(answers))
    error = pb.Error(code=pb.BUSY, message="no room", retry_after_ms=1000)
    return [*seeds, opened + _message(pb.InferenceReply(error=error))]


def info_seeds() -> list[bytes]:
    """The question and an answer."""
    return [
        _message(pb.InfoRequest(model_digest=MODEL.digest)),
        _message(pb.InfoReply(records=[b"record"], version="0.1.0")),
    ]
