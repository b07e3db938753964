"""The inference conversation: what may be said when, for both ends, under any schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import ProtocolViolation, RemoteProtocolError
from petals.protocols.inference import Conversation, State, step_payload
from petals.protocols.tensors import encode_tensor
from petals.protocols.training import request_payload

DIGEST = "ab" * 32


def opening(**changes: object) -> pb.InferenceRequest:
    fields: dict[str, object] = {
        "session_id": bytes(16),
        "model_digest": DIGEST,
        "start_block": 0,
        "end_block": 4,
        "batch_size": 2,
        "max_length": 10,
    }
    return pb.InferenceRequest(open=pb.Open(**(fields | changes)))  # type: ignore[arg-type]


def step(step_id: int, position: int, tokens: int) -> pb.InferenceRequest:
    header, _ = encode_tensor(torch.zeros(2, tokens, 8))
    return pb.InferenceRequest(step=pb.Step(step_id=step_id, position=position, hidden=header))


def done(step_id: int) -> pb.InferenceReply:
    return pb.InferenceReply(step_done=pb.StepDone(step_id=step_id))


OPENED = pb.InferenceReply(opened=pb.Opened())


def ready() -> Conversation:
    conversation = Conversation()
    conversation.request(opening())
    conversation.reply(OPENED)
    return conversation


def test_a_session_from_open_to_close() -> None:
    conversation = ready()
    assert conversation.request(step(0, 0, 4)) == "step"
    assert conversation.request(step(1, 4, 1)) == "step"  # sent before the first answer
    assert conversation.reply(done(0)) == "step_done"
    assert conversation.reply(done(1)) == "step_done"
    assert conversation.position == 5
    conversation.request(step(2, 3, 1))  # rolls back to 3
    assert conversation.position == 4
    assert conversation.request(pb.InferenceRequest(close=pb.Close())) == "close"
    assert conversation.state is State.CLOSED


@pytest.mark.parametrize(
    "message",
    [
        pb.InferenceRequest(),
        opening(session_id=b"short"),
        opening(model_digest="AB" * 32),
        opening(model_digest=""),
        opening(start_block=4),
        opening(end_block=4097),
        opening(batch_size=0),
        opening(batch_size=1025),
        opening(max_length=0),
        opening(max_length=2**20 + 1),
        step(0, 0, 1),
        pb.InferenceRequest(close=pb.Close()),
    ],
)
def test_what_may_not_come_first(message: pb.InferenceRequest) -> None:
    conversation = Conversation()
    with pytest.raises(ProtocolViolation):
        conversation.request(message)
    assert conversation.state is State.IDLE
    conversation.request(opening())  # and nothing has been spoilt


@pytest.mark.parametrize("message", [step(1, 0, 1), step(0, 1, 1), step(0, 0, 11), opening()])
def test_what_may_not_come_next(message: pb.InferenceRequest) -> None:
    conversation = ready()
    with pytest.raises(ProtocolViolation):
        conversation.request(message)
    conversation.request(step(0, 0, 10))


def test_an_answer_nobody_asked_for() -> None:
    conversation = ready()
    with pytest.raises(ProtocolViolation):
        conversation.reply(done(0))
    conversation.request(step(0, 0, 1))
    with pytest.raises(ProtocolViolation):
        conversation.reply(done(1))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12), st.integers(1, 6)), max_size=30))
def test_any_schedule_keeps_position_and_order(moves: list[tuple[bool, int, int]]) -> None:
    conversation, position, asked, answered = ready(), 0, 0, 0
    for ask, start, tokens in moves:
        if ask:
            allowed = start <= position and start + tokens <= 10
            try:
                conversation.request(step(asked, start, tokens))
            except ProtocolViolation:
                assert not allowed
            else:
                assert allowed
                position, asked = start + tokens, asked + 1
        elif answered < asked:
            conversation.reply(done(answered))
            answered += 1
        else:
            with pytest.raises(ProtocolViolation):
                conversation.reply(done(answered))
        assert conversation.position == position


def test_the_payload_of_a_step_is_checked_against_its_session() -> None:
    session = opening().open
    whole = step(0, 0, 3).step
    whole.attention_mask.CopyFrom(encode_tensor(torch.ones(2, 3, dtype=torch.bool))[0])
    whole.prompts.CopyFrom(encode_tensor(torch.zeros(4, 2, 2, 8))[0])
    whole.hypo_ids.CopyFrom(encode_tensor(torch.zeros(2, dtype=torch.int64))[0])
    plan = step_payload(whole, session, 8)
    assert [(name, size) for name, _, size in plan] == [
        ("hidden", 2 * 3 * 8 * 4),
        ("attention_mask", 6),
        ("prompts", 4 * 2 * 2 * 8 * 4),
        ("hypo_ids", 16),
    ]
    for name, wrong in (
        ("hidden", torch.zeros(2, 3, 9)),
        ("hidden", torch.zeros(3, 3, 8)),
        ("hidden", torch.zeros(2, 3, 8, dtype=torch.int64)),
        ("attention_mask", torch.ones(2, 4, dtype=torch.bool)),
        ("attention_mask", torch.ones(2, 3)),
        ("prompts", torch.zeros(3, 2, 2, 8)),
        ("prompts", torch.zeros(4, 2, 4, 8)),
        ("hypo_ids", torch.zeros(3, dtype=torch.int64)),
        ("hypo_ids", torch.zeros(2)),
    ):
        broken = pb.Step.FromString(whole.SerializeToString())
        getattr(broken, name).CopyFrom(encode_tensor(wrong)[0])
        with pytest.raises(RemoteProtocolError):
            step_payload(broken, session, 8)


def test_the_payload_of_a_training_request_is_checked() -> None:
    hidden, _ = encode_tensor(torch.zeros(2, 3, 8))
    request = pb.TrainingRequest(model_digest=DIGEST, start_block=0, end_block=4, hidden=hidden)
    assert [name for name, _, _ in request_payload(request, 8, backward=False)] == ["hidden"]
    with pytest.raises(RemoteProtocolError):
        request_payload(request, 8, backward=True)  # without a gradient
    request.grad_output.CopyFrom(hidden)
    assert [name for name, _, _ in request_payload(request, 8, backward=True)] == ["hidden", "grad_output"]
    with pytest.raises(RemoteProtocolError):
        request_payload(request, 8, backward=False)
    with pytest.raises(RemoteProtocolError):
        request_payload(request, 16, backward=True)
