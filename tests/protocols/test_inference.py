"""The inference conversation: what may be said when, for both ends, under any schedule."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import ProtocolViolation, RemoteProtocolError
from petals.protocols.inference import (
    MAX_BATCH_SIZE,
    MAX_BLOCKS,
    MAX_LENGTH,
    MAX_STEPS_IN_FLIGHT,
    Conversation,
    State,
    step_payload,
)
from petals.protocols.tensors import MAX_TENSOR_BYTES, check_header, encode_tensor

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
    header = pb.Tensor(dtype=pb.FLOAT32, shape=[2, tokens, 8])
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


CLOSE = pb.InferenceRequest(close=pb.Close())
FAILED = pb.InferenceReply(error=pb.Error(code=pb.BUSY))

SPEECHES: dict[str, pb.InferenceRequest | pb.InferenceReply] = {
    "open": opening(),
    "step": step(1, 4, 1),
    "close": CLOSE,
    "nothing asked": pb.InferenceRequest(),
    "opened": OPENED,
    "step_done": done(0),
    "error": FAILED,
    "nothing answered": pb.InferenceReply(),
}
ALLOWED = {  # as SPEC.md has it
    State.IDLE: {"open": State.OPENING, "error": State.CLOSED},
    State.OPENING: {"opened": State.READY, "close": State.CLOSED, "error": State.CLOSED},
    State.READY: {"step": State.READY, "step_done": State.READY, "close": State.CLOSED, "error": State.CLOSED},
    State.CLOSED: {},
}


def in_state(state: State) -> Conversation:
    """In READY, step 0 of four tokens is unanswered."""
    conversation = Conversation()
    if state is not State.IDLE:
        conversation.request(opening())
    if state in (State.READY, State.CLOSED):
        conversation.reply(OPENED)
        conversation.request(step(0, 0, 4))
    if state is State.CLOSED:
        conversation.request(CLOSE)
    assert conversation.state is state
    return conversation


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", SPEECHES)
def test_the_whole_table(state: State, kind: str) -> None:
    conversation, message = in_state(state), SPEECHES[kind]
    before = copy.deepcopy(conversation)
    say = conversation.request if isinstance(message, pb.InferenceRequest) else conversation.reply
    if kind in ALLOWED[state]:
        assert say(message) == kind  # type: ignore[arg-type]
        assert conversation.state is ALLOWED[state][kind]
    else:
        with pytest.raises(ProtocolViolation) as caught:
            say(message)  # type: ignore[arg-type]
        assert caught.value.out_of_order
        assert conversation == before


@pytest.mark.parametrize(
    ("message", "out_of_order"),
    [
        (step(1, 1, 1), True),  # the id before the next
        (step(2, 1, 1), False),  # right: rolls back
        (step(3, 4, 1), True),
        (step(2, 5, 1), True),
        (step(2, 4, 7), False),
        (step(2, 4, 2**32 - 1), False),
        (pb.InferenceRequest(step=pb.Step(step_id=2, position=4)), False),
    ],
)
def test_whether_the_time_or_the_message_is_wrong(message: pb.InferenceRequest, out_of_order: bool) -> None:
    conversation = ready()
    conversation.request(step(0, 0, 3))
    conversation.request(step(1, 3, 1))
    before = copy.deepcopy(conversation)
    if message == step(2, 1, 1):
        conversation.request(message)
        assert conversation.position == 2
        return
    with pytest.raises(ProtocolViolation) as caught:
        conversation.request(message)
    assert caught.value.out_of_order is out_of_order
    assert conversation == before


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": MAX_BATCH_SIZE},
        {"max_length": MAX_LENGTH},
        {"start_block": MAX_BLOCKS - 1, "end_block": MAX_BLOCKS},
        {"reply_encoding": 99},  # a wish; answered in RAW by who does not know it
    ],
)
def test_limits_are_inclusive(changes: dict[str, object]) -> None:
    assert Conversation().request(opening(**changes)) == "open"


def test_a_replay_may_have_a_step_for_each_token() -> None:
    tokens = 5000
    assert tokens < MAX_STEPS_IN_FLIGHT == MAX_LENGTH
    conversation = Conversation()
    conversation.request(opening(batch_size=1, max_length=tokens))
    conversation.reply(OPENED)
    header = pb.Tensor(dtype=pb.FLOAT32, shape=[1, 1, 8])
    for index in range(tokens):
        conversation.request(pb.InferenceRequest(step=pb.Step(step_id=index, position=index, hidden=header)))
    for index in range(tokens):
        conversation.reply(done(index))
    assert conversation.position == tokens


def test_what_a_newer_peer_adds_is_ignored() -> None:
    unknown_field = bytes([0xFA, 0x01, 0x03]) + b"new"  # number 31, three bytes
    newer = pb.Open.FromString(opening().open.SerializeToString() + unknown_field)
    assert Conversation().request(pb.InferenceRequest(open=newer)) == "open"
    with pytest.raises(ProtocolViolation, match="unknown message"):  # a new kind is not: it needs a new protocol ID
        ready().request(pb.InferenceRequest.FromString(unknown_field))


class TwoEnds(RuleBasedStateMachine):
    """A client and a server who keep to the table, with a wire in both directions that delivers whenever it likes.

    The model is the sequence itself: `said` is what the client believes the server's cache to be, `cache` is what the
    server has made of the steps it took. No schedule may let an honest end blame the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.client, self.server = Conversation(), Conversation()
        self.requests: deque[tuple[bytes, list[int]]] = deque()
        self.replies: deque[tuple[bytes, list[int]]] = deque()
        self.said: list[int] = []
        self.promised: deque[list[int]] = deque()
        self.cache: list[int] = []
        self.fresh = 0

    def ask(self, request: pb.InferenceRequest, tokens: list[int]) -> None:
        self.client.request(request)
        self.requests.append((request.SerializeToString(), tokens))

    def answer(self, reply: pb.InferenceReply, cache: list[int]) -> None:
        self.server.reply(reply)
        self.replies.append((reply.SerializeToString(), list(cache)))

    @precondition(lambda self: self.client.state is State.IDLE)
    @rule()
    def client_opens(self) -> None:
        self.ask(opening(), [])

    @precondition(lambda self: self.client.state is State.READY)
    @rule(back=st.integers(0, 12), tokens=st.integers(1, 4))
    def client_steps(self, back: int, tokens: int) -> None:
        position = max(0, len(self.said) - back)
        tokens = min(tokens, 10 - position)
        if tokens:
            new = list(range(self.fresh, self.fresh + tokens))
            self.fresh += tokens
            self.ask(step(self.client.next_step_id, position, tokens), new)
            self.said = self.said[:position] + new
            self.promised.append(self.said)

    @precondition(lambda self: self.client.state in (State.OPENING, State.READY))
    @rule(really=st.integers(0, 9))
    def client_closes(self, really: int) -> None:
        if not really:
            self.ask(CLOSE, [])

    @precondition(lambda self: self.server.state is not State.CLOSED and self.requests)
    @rule()
    def server_takes_the_next(self) -> None:
        wire, tokens = self.requests.popleft()
        request = pb.InferenceRequest.FromString(wire)
        kind = self.server.request(request)  # raises if the schedule broke a rule
        if kind == "open":
            self.answer(OPENED, [])
        elif kind == "step":
            self.cache = self.cache[: request.step.position] + tokens
            self.answer(done(request.step.step_id), self.cache)

    @precondition(lambda self: self.server.state is not State.CLOSED)
    @rule(really=st.integers(0, 19))
    def server_gives_up(self, really: int) -> None:
        if not really:
            self.answer(FAILED, [])

    @precondition(lambda self: self.client.state is not State.CLOSED and self.replies)
    @rule()
    def client_hears_the_next(self) -> None:
        wire, cache = self.replies.popleft()
        if self.client.reply(pb.InferenceReply.FromString(wire)) == "step_done":
            assert cache == self.promised.popleft()

    @precondition(lambda self: State.CLOSED in (self.client.state, self.server.state))
    @rule()
    def who_has_ended_says_and_takes_nothing_more(self) -> None:
        for end in (self.client, self.server):
            if end.state is State.CLOSED:
                for request in (opening(), step(end.next_step_id, 0, 1), CLOSE):
                    with pytest.raises(ProtocolViolation):
                        end.request(request)
                for reply in (OPENED, done(end.unanswered[0] if end.unanswered else 0), FAILED):
                    with pytest.raises(ProtocolViolation):
                        end.reply(reply)

    @invariant()
    def each_end_knows_the_cache(self) -> None:
        assert self.client.position == len(self.said)
        assert self.server.position == len(self.cache) <= 10
        assert len(self.client.unanswered) == len(self.promised)
        assert len(self.server.unanswered) == 0


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


HEADERS = st.builds(
    lambda dtype, shape, encoding: pb.Tensor(dtype=dtype, shape=shape, encoding=encoding),
    st.integers(0, 6),
    st.lists(st.integers(0, 8) | st.integers(0, 2**32 - 1), max_size=5),
    st.integers(0, 3),
)


@settings(max_examples=300)
@given(
    position=st.integers(0, 3) | st.integers(0, 2**32 - 1),
    hidden=HEADERS | st.just(encode_tensor(torch.zeros(2, 3, 8))[0]),
    others=st.fixed_dictionaries({}, optional=dict.fromkeys(("attention_mask", "prompts", "hypo_ids"), HEADERS)),
)
def test_no_header_gets_past_the_plan(position: int, hidden: pb.Tensor, others: dict[str, pb.Tensor]) -> None:
    conversation = ready()
    conversation.request(step(0, 0, 3))
    whole = pb.Step(step_id=1, position=position, hidden=hidden, **others)
    try:
        conversation.request(pb.InferenceRequest(step=whole))
        plan = step_payload(whole, opening().open, 8)
    except (ProtocolViolation, RemoteProtocolError):
        return
    assert position <= 3
    assert [name for name, _, _ in plan] == [
        name for name in ("hidden", "attention_mask", "prompts", "hypo_ids") if name == "hidden" or name in others
    ]
    for name, header, size in plan:
        assert header == getattr(whole, name)
        every = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)
        assert size == check_header(header, name=name, shape=tuple(header.shape), dtypes=every) <= MAX_TENSOR_BYTES


def test_prompts_come_only_with_the_first_step() -> None:
    later = step(0, 3, 3).step
    later.prompts.CopyFrom(encode_tensor(torch.zeros(4, 2, 2, 8))[0])
    with pytest.raises(RemoteProtocolError, match="position 0"):
        step_payload(later, opening().open, 8)
