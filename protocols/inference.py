"""One inference session at one server, as a conversation without I/O.

The theory, in four rules:

1. The client speaks first (`Open`), and only after `Opened` may it send steps. It may send several steps before the
   first answer comes (a replay after a fail-over does): the server answers in the order it was asked. `Opened` says how
   long the cache is already: a server may still hold what an earlier session left (prefixes.py).
2. The server's cache is a prefix of the sequence. A step says at which position its tokens start; a position below the
   cache's end rolls the cache back to it first, one beyond the end is an error.
3. `Error` ends the conversation, whoever was to speak next. So does `Close`, which only the client says.
4. A step may announce that its input is pushed by the server that has the blocks before. Until it is answered, the
   client may supply the input itself; which of the two comes first is used. Nothing else is asked meanwhile.

Both ends hold a `Conversation`, feed it what they send and what they receive, and so can not break a rule without
noticing. A broken rule is a `ProtocolViolation`; whose fault it is, the end that catches it knows.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import ProtocolViolation, RemoteProtocolError
from petals.protocols.prefixes import MAX_PREFIXES, NAME_BYTES, PREFIX_TOKENS
from petals.protocols.tensors import BOOL, FLOATS, INT64, check_header

INFERENCE_V1 = "/petals/inference/1.0.0"

MAX_MESSAGE_BYTES = 64 << 10
"""A message without its payload."""
MAX_BATCH_SIZE = 1024
MAX_LENGTH = 1 << 20
MAX_BLOCKS = 4096
MAX_STEPS_IN_FLIGHT = MAX_LENGTH
"""Steps asked and not yet answered, at the client; the server reads one at a time and needs no limit of its own. A
replay after a fail-over sends all its steps at once, and has at most one for each token."""


class State(enum.Enum):
    IDLE = enum.auto()
    OPENING = enum.auto()
    READY = enum.auto()
    CLOSED = enum.auto()


MOVES: Mapping[tuple[State, str], State] = {
    (State.IDLE, "open"): State.OPENING,  # client asks for cache room
    (State.OPENING, "opened"): State.READY,  # server has leased it
    (State.READY, "step"): State.READY,  # hidden states out
    (State.READY, "step_done"): State.READY,
    (State.READY, "supply"): State.READY,  # the input of a step, for a push that does not come
    (State.OPENING, "close"): State.CLOSED,
    (State.READY, "close"): State.CLOSED,  # server takes the lease back
    (State.IDLE, "error"): State.CLOSED,
    (State.OPENING, "error"): State.CLOSED,
    (State.READY, "error"): State.CLOSED,
}


@dataclass
class Conversation:
    """What both ends know about a session. `position` is the cache's end once every step sent so far has run."""

    state: State = State.IDLE
    opening: pb.Open | None = None
    position: int = 0
    next_step_id: int = 0
    unanswered: deque[int] = field(default_factory=deque)
    last_pushed: pb.Step | None = None
    """The latest step whose input was to be pushed."""

    def request(self, message: pb.InferenceRequest) -> str:
        """Advance by what the client says. Returns its kind ("open", "step", "supply", "close").

        Raises:
            ProtocolViolation: not allowed now, or a number in it is out of its limits. The state is unchanged.
        """
        kind = message.WhichOneof("kind")
        target = self._target(kind)
        if kind == "open":
            _check_open(message.open)
            self.opening = message.open
        elif kind == "step":
            self._check_step(message.step)
            self.position = message.step.position + message.step.hidden.shape[1]
            self.next_step_id += 1
            self.unanswered.append(message.step.step_id)
            self.last_pushed = message.step if message.step.pushed_by else self.last_pushed
        elif kind == "supply":
            self._check_supply(message.supply)
        elif kind == "close":
            _check_names(message.close.prefixes)
        self.state = target
        return str(kind)

    def reply(self, message: pb.InferenceReply) -> str:
        """Advance by what the server says. Returns its kind ("opened", "step_done", "error")."""
        kind = message.WhichOneof("kind")
        target = self._target(kind)
        if kind == "opened":
            assert self.opening is not None
            self.position = _checked_prefix(message.opened.prefix_tokens, self.opening)
        elif kind == "step_done":
            if not self.unanswered or self.unanswered[0] != message.step_done.step_id:
                raise ProtocolViolation(
                    f"answer to step {message.step_done.step_id}, not the oldest unanswered one", out_of_order=True
                )
            self.unanswered.popleft()
        self.state = target
        return str(kind)

    def _target(self, kind: str | None) -> State:
        target = MOVES.get((self.state, kind or ""))
        if target is None:
            raise ProtocolViolation(f"{kind or 'an unknown message'} while {self.state.name}", out_of_order=True)
        return target

    def _check_step(self, step: pb.Step) -> None:
        assert self.opening is not None
        if step.step_id != self.next_step_id:
            raise ProtocolViolation(f"step {step.step_id}, {self.next_step_id} is next", out_of_order=True)
        if step.position > self.position:
            raise ProtocolViolation(
                f"step at position {step.position}, the cache ends at {self.position}", out_of_order=True
            )
        shape = step.hidden.shape
        if len(shape) != 3:
            raise ProtocolViolation(f"hidden: {len(shape)} dimensions instead of 3")
        if step.position + shape[1] > self.opening.max_length:
            raise ProtocolViolation(
                f"{shape[1]} tokens at position {step.position} are more than the session's {self.opening.max_length}"
            )
        if self._waits_for_push() or (step.pushed_by and self.unanswered):
            raise ProtocolViolation("a pushed step goes alone: no other may be unanswered", out_of_order=True)
        if len(self.unanswered) >= MAX_STEPS_IN_FLIGHT:
            raise ProtocolViolation(f"{MAX_STEPS_IN_FLIGHT} steps are unanswered already")

    def _waits_for_push(self) -> bool:
        return self.last_pushed is not None and self.last_pushed.step_id in self.unanswered

    def _check_supply(self, supply: pb.Supply) -> None:
        pushed = self.last_pushed
        if pushed is None or supply.step_id != pushed.step_id:
            raise ProtocolViolation(f"supply for step {supply.step_id}, which waits for no push", out_of_order=True)
        if supply.hidden.shape != pushed.hidden.shape:
            raise ProtocolViolation(f"supply of another shape than step {supply.step_id} announced")


def _check_open(opening: pb.Open) -> None:
    if len(opening.session_id) != 16:
        raise ProtocolViolation(f"session_id of {len(opening.session_id)} bytes instead of 16")
    check_model(opening.model_digest, opening.start_block, opening.end_block)
    if not 0 < opening.batch_size <= MAX_BATCH_SIZE:
        raise ProtocolViolation(f"batch_size {opening.batch_size}, allowed are 1 to {MAX_BATCH_SIZE}")
    if not 0 < opening.max_length <= MAX_LENGTH:
        raise ProtocolViolation(f"max_length {opening.max_length}, allowed are 1 to {MAX_LENGTH}")
    _check_names(opening.prefixes)


def _check_names(names: Sequence[bytes]) -> None:
    if len(names) > MAX_PREFIXES or any(len(name) != NAME_BYTES for name in names):
        raise ProtocolViolation(f"prefixes: at most {MAX_PREFIXES} names of {NAME_BYTES} bytes")


def _checked_prefix(tokens: int, opening: pb.Open) -> int:
    if tokens % PREFIX_TOKENS or tokens > min(len(opening.prefixes) * PREFIX_TOKENS, opening.max_length):
        raise ProtocolViolation(f"a prefix of {tokens} tokens, which was not asked for")
    return tokens


def check_model(digest: str, start_block: int, end_block: int) -> None:
    """What every request says about the model: a digest of 64 hex digits and a half-open block range."""
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ProtocolViolation("model_digest is not 64 lower-case hex digits")
    if not 0 <= start_block < end_block <= MAX_BLOCKS:
        raise ProtocolViolation(f"blocks {start_block}:{end_block} are no range within 0:{MAX_BLOCKS}")


def step_payload(step: pb.Step, opening: pb.Open, hidden_size: int) -> list[tuple[str, pb.Tensor, int]]:
    """The tensors behind a step, as (name, header, bytes on the wire), checked against the session.

    Raises:
        RemoteProtocolError: a dtype, shape or size that does not fit.
    """
    batch, tokens = opening.batch_size, step.hidden.shape[1]
    hidden_bytes = check_header(step.hidden, name="hidden", shape=(batch, tokens, hidden_size))
    plan = [] if step.pushed_by else [("hidden", step.hidden, hidden_bytes)]
    if step.HasField("attention_mask"):
        shape: tuple[int | None, ...] = (batch, step.position + tokens)
        size = check_header(step.attention_mask, name="attention_mask", shape=shape, dtypes=BOOL)
        plan.append(("attention_mask", step.attention_mask, size))
    if step.HasField("prompts"):
        shape = (opening.end_block - opening.start_block, batch, None, hidden_size)
        size = check_header(step.prompts, name="prompts", shape=shape, dtypes=FLOATS)
        if step.position or step.prompts.shape[2] > tokens:
            raise RemoteProtocolError("prompts: only with the step at position 0, and no longer than it")
        plan.append(("prompts", step.prompts, size))
    if step.HasField("hypo_ids"):
        size = check_header(step.hypo_ids, name="hypo_ids", shape=(batch,), dtypes=INT64)
        plan.append(("hypo_ids", step.hypo_ids, size))
    return plan
