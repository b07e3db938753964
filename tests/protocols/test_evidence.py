"""What servers sign: the history follows the cache, and nothing that is signed can be moved elsewhere."""

from __future__ import annotations

import hashlib
import random
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.peer.base.identity import Identity, create_identity, verify
from petals.protocols.evidence import (
    MAX_COMPLAINT_BYTES,
    Complaint,
    EvidenceError,
    History,
    SignedAnswer,
    Statement,
    Told,
    open_complaint,
    sign_complaint,
)

ROWS = 3


def name(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@given(seed=st.integers(0, 2**32))
def test_two_caches_are_the_same_exactly_if_their_histories_are(seed: int) -> None:
    """Against a cache that is kept row by row: each cell holds what was written there; roll-backs leave reordered rows
    where they are. What another server would have to be told leads to the same digest."""
    dice = random.Random(seed)
    history, cache, told = History(), [[] for _ in range(ROWS)], []  # type: ignore[var-annotated]
    carried: tuple[int, ...] | None = None
    for index in range(dice.randint(1, 8)):
        position = dice.randint(0, len(cache[0]))
        order = tuple(dice.choices(range(ROWS), k=ROWS)) if dice.random() < 0.5 else None
        history.add(Told(position=position, hidden=name(str(index)), order=order))
        while told and told[-1].position >= position:
            dropped = told.pop().order
            if dropped is not None:
                carried = dropped if carried is None else tuple(dropped[row] for row in carried)
        cache = [row[:position] for row in cache]
        if order is not None:
            cache = [cache[row] for row in order]
        cache = [[*row, f"{index}.{place}"] for place, row in enumerate(cache)]
        if carried is not None:
            order = carried if order is None else tuple(carried[row] for row in order)
        told.append(Told(position=position, hidden=name(str(index)), order=order))
        carried = None
    other, again = History(), [[] for _ in range(ROWS)]  # type: ignore[var-annotated]
    for step in told:
        other.add(step)
        if step.order is not None:
            again = [again[row] for row in step.order]
        index = next(index for index in range(8) if name(str(index)) == step.hidden)
        again = [[*row, f"{index}.{place}"] for place, row in enumerate(again)]
    assert other.digest == history.digest
    assert again == cache
    longer = replace(told[-1], attention_mask=name("mask"))
    other.add(longer)
    assert other.digest != history.digest


def test_a_prefix_counts_until_it_is_rolled_back() -> None:
    first = Told(position=0, hidden=name("a"))
    empty, prefix = History(), History(prefix=name("p"))
    assert empty.digest != prefix.digest != History(lora=name("l")).digest
    empty.add(replace(first, position=32))
    prefix.add(replace(first, position=32))
    assert empty.digest != prefix.digest
    empty.add(first)
    prefix.add(first)
    assert empty.digest == prefix.digest


STATEMENT = Statement(
    session_id=bytes(16), step_id=3, model_digest="ab" * 32, blocks=range(2, 4), adapter="", dtype="float32",
    quant_type="none", inputs=name("in"), output=name("out"),
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"session_id": b"1" * 16}, {"step_id": 4}, {"model_digest": "cd" * 32}, {"blocks": range(2, 5)},
        {"adapter": "a"}, {"dtype": "bfloat16"}, {"quant_type": "int8"}, {"inputs": name("x")}, {"output": name("x")},
        {"adapter": "float32", "dtype": ""},
    ],
)  # fmt: skip
def test_every_word_of_a_statement_is_signed(change: dict[str, object]) -> None:
    assert replace(STATEMENT, **change).to_bytes() != STATEMENT.to_bytes()  # type: ignore[arg-type]


LIAR, HONEST, ACCUSER = create_identity(), create_identity(), create_identity()


def signed(who: Identity, statement: Statement = STATEMENT) -> SignedAnswer:
    signature = who.sign(statement.to_bytes())
    return SignedAnswer(peer_id=who.peer_id, public_key=who.public_key, statement=statement, signature=signature)


def complaint(**changes: object) -> Complaint:
    fields: dict[str, object] = {
        "accuser": ACCUSER.peer_id,
        "answer": signed(LIAR),
        "others": (signed(HONEST, replace(STATEMENT, session_id=b"2" * 16, step_id=0, output=name("right"))),),
        "error": 0.5,
        "tolerance": 1e-4,
        "issued_at": 1000.0,
        "expires_at": 2000.0,
    }
    return Complaint(**(fields | changes))  # type: ignore[arg-type]


def test_a_complaint_travels() -> None:
    data = sign_complaint(complaint(), ACCUSER.sign, ACCUSER.public_key)
    assert len(data) < MAX_COMPLAINT_BYTES
    assert open_complaint(data, now=1500.0, verify=verify) == complaint()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accuser": HONEST.peer_id}, "not signed by the peer it names"),
        ({"issued_at": 1700.0}, "dated in the future"),
        ({"expires_at": 1400.0}, "expired"),
        ({"expires_at": 1e6}, "lives too long"),
        ({"error": 1e-5}, "within its tolerance"),
        ({"error": float("nan")}, "within its tolerance"),
        ({"answer": signed(ACCUSER)}, "about oneself"),
        ({"answer": replace(signed(LIAR), peer_id=HONEST.peer_id)}, "an answer that nobody signed"),
        ({"answer": replace(signed(LIAR), statement=replace(STATEMENT, output=name("y")))}, "that nobody signed"),
        ({"others": (signed(HONEST, replace(STATEMENT, inputs=name("y"), output=name("z"))),)}, "different questions"),
        ({"others": (signed(HONEST),)}, "answers that agree"),
        ({"others": (signed(LIAR, replace(STATEMENT, output=name("z"))),)}, "one peer twice"),
        ({"others": (signed(HONEST),) * 4}, "too long"),
        ({"answer": signed(LIAR, replace(STATEMENT, adapter="a" * 5000))}, "bytes, at most"),
    ],
)
def test_what_is_not_believed(changes: dict[str, object], said: str) -> None:
    data = sign_complaint(complaint(**changes), ACCUSER.sign, ACCUSER.public_key)
    with pytest.raises(EvidenceError, match=said):
        open_complaint(data, now=1500.0, verify=verify)


@given(data=st.binary(max_size=300), place=st.integers(0, 400), bit=st.integers(0, 7))
def test_garbage_is_refused_in_our_own_words(data: bytes, place: int, bit: int) -> None:
    genuine = bytearray(sign_complaint(complaint(), ACCUSER.sign, ACCUSER.public_key))
    genuine[place % len(genuine)] ^= 1 << bit
    for mutated in (data, bytes(genuine)):
        with suppress(EvidenceError):
            assert open_complaint(mutated, now=1500.0, verify=verify) == complaint()
