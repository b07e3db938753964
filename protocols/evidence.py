"""What a server signs about its answers, and what a client makes of an answer that was wrong. Sans I/O, no tensors.

An answer depends on everything its cache is made of. So a server keeps a running digest of what the session has told it
(`History`), and signs for each answer a fixed string of bytes over that digest, the digest of the output, and what it
says it computed with (`Statement`). Both ends can make the string, so only the signature travels. The history follows
the cache: a roll-back takes back what it rolls back, and row orders that were taken back are carried into the next
step, for the rows stay where they were put. So it is the digest of what another server would have to be told to come
to the same cache, and two servers that were told the same sign the same inputs.

Digests say which numbers were meant, not how far two numbers are apart: two honest servers round differently, and sign
different outputs. Whoever judges a complaint needs the numbers themselves, which stay with who complains: they are
somebody's words.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import SwarmError
from petals.protocols.types import PeerId

ANSWER_DOMAIN = b"petals/answer/1\n"
COMPLAINT_DOMAIN = b"petals/complaint/1\n"
"""Signed in front, so that no signature for another purpose can be passed off as one."""
DIGEST_BYTES = 32
NOTHING = bytes(DIGEST_BYTES)
"""Stands for the digest of what is not there."""

MAX_COMPLAINT_BYTES = 4 << 10
MAX_COMPLAINT_LIFE_S = 24 * 3600.0
MAX_CLOCK_SKEW_S = 60.0
MAX_ANSWERS = 3
MAX_TEXT = 200

Verify = Callable[[PeerId, bytes, bytes, bytes], bool]
"""(peer ID, public key, data, signature) -> whether that peer signed it."""
Order = tuple[int, ...]


def compose(first: Order | None, then: Order | None) -> Order | None:
    """The row order of doing `first`, then `then`."""
    if first is None or then is None:
        return then if first is None else first
    return tuple(first[row] for row in then)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One step as it enters the history: digests of its tensors (`tensors.digest_tensor`), None where there is none."""

    position: int
    hidden: bytes
    attention_mask: bytes | None = None
    prompts: bytes | None = None
    order: Order | None = None

    def after(self, before: bytes) -> bytes:
        """The digest of a history that goes on with this step."""
        order = NOTHING
        if self.order is not None:
            order = hashlib.sha256(struct.pack(f"<{len(self.order)}I", *self.order)).digest()
        parts = (self.hidden, self.attention_mask or NOTHING, self.prompts or NOTHING, order)
        return hashlib.sha256(before + struct.pack("<I", self.position) + b"".join(parts)).digest()


@dataclass
class History:
    """What a cache is made of, told step by step.

    Args:
        prefix: the name of what the cache began with; empty: with nothing.
        lora: digest of the updates that the client sent with the opening.
    """

    prefix: bytes = b""
    lora: bytes = NOTHING
    _steps: list[tuple[Told, bytes]] = field(default_factory=list)
    """Each with the digest of the history up to it."""

    def add(self, step: Told) -> None:
        """A step has been told; what is at or after its position is rolled back first."""
        order: Order | None = None
        kept = len(self._steps)
        while kept and self._steps[kept - 1][0].position >= step.position:
            kept -= 1
        for dropped, _ in self._steps[kept:]:
            order = compose(order, dropped.order)
        del self._steps[kept:]
        if step.position == 0:
            self.prefix = b""
        if order is not None:
            step = Told(
                position=step.position,
                hidden=step.hidden,
                attention_mask=step.attention_mask,
                prompts=step.prompts,
                order=compose(order, step.order),
            )
        self._steps.append((step, step.after(self.digest)))

    @property
    def digest(self) -> bytes:
        """Of all of it."""
        if self._steps:
            return self._steps[-1][1]
        return hashlib.sha256((self.prefix or NOTHING) + self.lora).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a server says about one answer."""

    session_id: bytes
    step_id: int
    model_digest: str
    blocks: range
    adapter: str
    dtype: str
    """What it computed in: float32, bfloat16 or float16."""
    quant_type: str
    inputs: bytes
    """`History.digest`, with this step in it."""
    output: bytes
    """`tensors.digest_tensor` of the answer as it travelled."""

    def to_bytes(self) -> bytes:
        """What is signed, `ANSWER_DOMAIN` in front."""
        numbers = struct.pack("<QII", self.step_id, self.blocks.start, self.blocks.stop)
        texts = [text.encode() for text in (self.adapter, self.dtype, self.quant_type)]
        described = b"".join(struct.pack("<H", len(text)) + text for text in texts)
        digests = bytes.fromhex(self.model_digest) + self.inputs + self.output
        return ANSWER_DOMAIN + self.session_id + numbers + digests + described


class EvidenceError(SwarmError):
    """A complaint that is not believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedAnswer:
    """A statement, and whose it is."""

    peer_id: PeerId
    public_key: bytes
    statement: Statement
    signature: bytes

    def is_genuine(self, verify: Verify) -> bool:
        """Whether that peer has signed that statement."""
        return verify(self.peer_id, self.public_key, self.statement.to_bytes(), self.signature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Complaint:
    """One peer's word that another one answered wrongly, with what the latter signed."""

    accuser: PeerId
    answer: SignedAnswer
    """The one complained about."""
    others: tuple[SignedAnswer, ...] = ()
    """What other holders of the same blocks answered to the same inputs."""
    error: float
    tolerance: float
    """How far the answer was from the right one (peer/client/audit/comparison.py), and how far it may be."""
    issued_at: float
    expires_at: float
    """Unix seconds; at most a day apart."""

    @property
    def accused(self) -> PeerId:
        return self.answer.peer_id


def sign_complaint(complaint: Complaint, sign: Callable[[bytes], bytes], public_key: bytes) -> bytes:
    """The complaint as it travels."""
    body = pb.Complaint(
        accuser=complaint.accuser,
        answer=_to_message(complaint.answer),
        others=[_to_message(answer) for answer in complaint.others],
        error=complaint.error,
        tolerance=complaint.tolerance,
        issued_at=complaint.issued_at,
        expires_at=complaint.expires_at,
    ).SerializeToString()
    signature = sign(COMPLAINT_DOMAIN + body)
    return pb.SignedComplaint(public_key=public_key, complaint=body, signature=signature).SerializeToString()


def open_complaint(data: bytes, *, now: float, verify: Verify) -> Complaint:
    """The complaint in `data`, after every check.

    It proves that the accused has signed this answer, that the others have signed another one about the same inputs,
    blocks and precision, and who complains. It does not prove that the answer is wrong.

    Raises:
        EvidenceError: too large, garbage, not signed by whom it names, expired, or answers to different questions.
    """
    if len(data) > MAX_COMPLAINT_BYTES:
        raise EvidenceError(f"complaint of {len(data)} bytes, at most {MAX_COMPLAINT_BYTES}")
    try:
        envelope = pb.SignedComplaint.FromString(data)
        body = pb.Complaint.FromString(envelope.complaint)
    except DecodeError:
        raise EvidenceError("a complaint that does not decode") from None
    accuser = PeerId(body.accuser)
    _check(len(accuser) <= MAX_TEXT and len(body.others) <= MAX_ANSWERS, "too long")
    signed = verify(accuser, envelope.public_key, COMPLAINT_DOMAIN + envelope.complaint, envelope.signature)
    _check(signed, "not signed by the peer it names")
    times = (body.issued_at, body.expires_at)
    _check(all(map(math.isfinite, times)), "time that is no number")
    _check(body.issued_at <= now + MAX_CLOCK_SKEW_S, "dated in the future")
    _check(body.issued_at < body.expires_at <= body.issued_at + MAX_COMPLAINT_LIFE_S, "lives too long")
    _check(now < body.expires_at, "expired")
    _check(body.error > body.tolerance >= 0, "about an answer that was within its tolerance")
    answer, others = _from_message(body.answer), tuple(_from_message(other) for other in body.others)
    _check(answer.peer_id != accuser, "about oneself")
    _check(all(each.is_genuine(verify) for each in (answer, *others)), "an answer that nobody signed")
    subjects = {_subject(each.statement) for each in (answer, *others)}
    _check(len(subjects) == 1, "answers to different questions")
    _check(all(other.statement.output != answer.statement.output for other in others), "answers that agree")
    _check(len({each.peer_id for each in (answer, *others)}) == 1 + len(others), "one peer twice")
    return Complaint(
        accuser=accuser,
        answer=answer,
        others=others,
        error=body.error,
        tolerance=body.tolerance,
        issued_at=body.issued_at,
        expires_at=body.expires_at,
    )


def _subject(said: Statement) -> tuple[object, ...]:
    return said.model_digest, said.blocks, said.adapter, said.dtype, said.quant_type, said.inputs


def _to_message(answer: SignedAnswer) -> pb.SignedAnswer:
    said = answer.statement
    return pb.SignedAnswer(
        peer_id=answer.peer_id,
        public_key=answer.public_key,
        signature=answer.signature,
        session_id=said.session_id,
        step_id=said.step_id,
        model_digest=said.model_digest,
        start_block=said.blocks.start,
        end_block=said.blocks.stop,
        adapter=said.adapter,
        dtype=said.dtype,
        quant_type=said.quant_type,
        inputs=said.inputs,
        output=said.output,
    )


def _from_message(message: pb.SignedAnswer) -> SignedAnswer:
    _check(len(message.session_id) == 16, "bad session")
    _check(len(message.inputs) == len(message.output) == DIGEST_BYTES, "bad digest")
    texts: Sequence[str] = (message.peer_id, message.adapter, message.dtype, message.quant_type)
    _check(all(len(text) <= MAX_TEXT for text in texts), "text too long")
    _check(len(message.model_digest) == 64 and set(message.model_digest) <= set("0123456789abcdef"), "bad model digest")
    _check(message.start_block < message.end_block <= 4096, "bad block range")
    return SignedAnswer(
        peer_id=PeerId(message.peer_id),
        public_key=message.public_key,
        signature=message.signature,
        statement=Statement(
            session_id=message.session_id,
            step_id=message.step_id,
            model_digest=message.model_digest,
            blocks=range(message.start_block, message.end_block),
            adapter=message.adapter,
            dtype=message.dtype,
            quant_type=message.quant_type,
            inputs=message.inputs,
            output=message.output,
        ),
    )


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise EvidenceError(f"complaint: {otherwise}")
