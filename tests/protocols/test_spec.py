"""SPEC.md and the code say the same: recorded frames of 1.0.0 still decode and are still written, limits agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from petals.protocols import info, receipts, weights
from petals.protocols import messages_pb2 as pb
from petals.protocols.framing import FrameDecoder, encode_frame
from petals.protocols.inference import (
    MAX_BATCH_SIZE,
    MAX_BLOCKS,
    MAX_LENGTH,
    MAX_MESSAGE_BYTES,
    MAX_STEPS_IN_FLIGHT,
    MOVES,
    Conversation,
    State,
    step_payload,
)
from petals.protocols.lora import MAX_LORA_LAYERS, MAX_PATH, MAX_RANK
from petals.protocols.tensors import (
    DTYPES,
    ENCODINGS,
    MAX_DIMENSIONS,
    MAX_TENSOR_BYTES,
    check_header,
    decode_tensor,
    encode_tensor,
)

SPEC = (Path(__file__).parents[2] / "protocols" / "SPEC.md").read_text(encoding="utf-8")
TENSOR = torch.tensor([[[1.0, -2.0, 0.5, 127.0]]])


def recorded() -> dict[str, tuple[bytes, bytes]]:
    block = re.search(r"```text\n(.*?)```", SPEC, re.DOTALL)
    assert block is not None
    frames: dict[str, tuple[bytes, bytes]] = {}
    for line in block[1].splitlines():
        name, message, *payload = line.split()
        frames[name] = (bytes.fromhex(message), bytes.fromhex("".join(payload)))
    return frames


FRAMES = recorded()
STEPS = {"step_raw": pb.RAW, "step_as_float16": pb.AS_FLOAT16, "step_blockwise_int8": pb.BLOCKWISE_INT8}


def written() -> dict[str, pb.InferenceRequest | pb.InferenceReply]:
    opening = pb.Open(
        session_id=bytes(range(16)),
        model_digest="ab" * 32,
        start_block=0,
        end_block=4,
        batch_size=1,
        max_length=300,
        wait_ms=1000,
        reply_encoding=pb.BLOCKWISE_INT8,
    )
    int8, _ = encode_tensor(TENSOR, pb.BLOCKWISE_INT8)
    return {
        "open": pb.InferenceRequest(open=opening),
        "opened": pb.InferenceReply(opened=pb.Opened(dtype=pb.FLOAT32, cache_bytes=4096)),
        **{
            name: pb.InferenceRequest(step=pb.Step(hidden=encode_tensor(TENSOR, encoding)[0]))
            for name, encoding in STEPS.items()
        },
        "step_done": pb.InferenceReply(step_done=pb.StepDone(hidden=int8, queue_us=5, compute_us=900)),
        "close": pb.InferenceRequest(close=pb.Close()),
        "error": pb.InferenceReply(error=pb.Error(code=pb.BUSY, message="full", retry_after_ms=1000)),
    }


WRITTEN = written()


def test_every_example_is_known() -> None:
    assert list(FRAMES) == list(WRITTEN)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_recorded_frame_still_decodes_and_is_still_written(name: str) -> None:
    message, (frame, _) = WRITTEN[name], FRAMES[name]
    decoder = FrameDecoder(MAX_MESSAGE_BYTES)
    decoder.receive_data(frame)
    got = decoder.next_frame()
    assert got is not None
    assert decoder.is_empty()
    assert type(message).FromString(got) == message
    assert encode_frame(message.SerializeToString(deterministic=True)) == frame


@pytest.mark.parametrize("name", STEPS)
def test_a_recorded_step_is_what_it_was(name: str) -> None:
    conversation = Conversation()
    for request in (WRITTEN["open"], WRITTEN["opened"], WRITTEN[name]):
        if isinstance(request, pb.InferenceRequest):
            conversation.request(request)
        else:
            conversation.reply(request)
    assert conversation.opening is not None
    step, payload = WRITTEN[name].step, FRAMES[name][1]  # type: ignore[union-attr]
    assert [size for _, _, size in step_payload(step, conversation.opening, 4)] == [len(payload)]
    error = 0.5 if step.hidden.encoding == pb.BLOCKWISE_INT8 else 0.0  # a scale of 1: ties go to even
    torch.testing.assert_close(decode_tensor(step.hidden, bytearray(payload)), TENSOR, rtol=0, atol=error)
    assert b"".join(encode_tensor(TENSOR, STEPS[name])[1]) == payload


@pytest.mark.parametrize(
    ("row", "numbers"),
    [
        ("message, inference, forward and backward", [MAX_MESSAGE_BYTES]),
        ("message, info", [info.MAX_REQUEST_BYTES, info.MAX_REPLY_BYTES]),
        ("message, weights", [weights.MAX_REQUEST_BYTES, weights.MAX_REPLY_BYTES]),
        ("payload of one answer, weights", [weights.MAX_PART_BYTES]),
        ("one document of a checkpoint", [weights.MAX_DOCUMENT_BYTES]),
        ("numbers of documents", [weights.MAX_DOCUMENTS]),
        ("message, receipts", [receipts.MAX_MESSAGE_BYTES]),
        ("one receipt; references in one reply", [receipts.MAX_RECEIPT_BYTES, receipts.MAX_REFERENCES]),
        ("dimensions of a tensor", [MAX_DIMENSIONS, 1]),
        ("one tensor as it travels", [MAX_TENSOR_BYTES]),
        ("one tensor's elements", [MAX_TENSOR_BYTES // 2]),
        ("blocks", [MAX_BLOCKS]),
        ("`batch_size`", [1, MAX_BATCH_SIZE]),
        ("`max_length`, or tokens of a training request", [1, MAX_LENGTH]),
        ("layers of `lora` in one message; rank; length of a `path`", [MAX_LORA_LAYERS, MAX_RANK, 1, MAX_PATH]),
        ("steps unanswered in one session", [MAX_STEPS_IN_FLIGHT]),
    ],
)
def test_limits_are_the_specified_ones(row: str, numbers: list[int]) -> None:
    limit = re.search(rf"^\| {re.escape(row)} \| (.*?) \|", SPEC, re.MULTILINE)
    assert limit is not None
    assert [int(number) for number in re.findall(r"\d+", limit[1].replace("`INT64`", ""))] == numbers


def test_numbers_of_enumerations_are_the_specified_ones() -> None:
    said = {name: int(number) for name, number in re.findall(r"`([A-Z][A-Z_0-9]+)` = (\d+)", SPEC)}
    for enum in (pb.DType, pb.Encoding, pb.ErrorCode):
        for name, number in enum.items():
            assert name.endswith("UNSPECIFIED") or said.pop(name) == number
    assert not said
    assert {pb.Encoding.Name(each) for each in ENCODINGS} == set(pb.Encoding.keys())
    assert set(DTYPES) == set(pb.DType.values()) - {pb.DTYPE_UNSPECIFIED}
    check_header(pb.Tensor(dtype=pb.FLOAT32, shape=[1] * MAX_DIMENSIONS), name="x", shape=(None,) * MAX_DIMENSIONS)


def test_the_table_of_moves_is_the_specified_one() -> None:
    said: dict[tuple[str, str], str] = {}
    for state, *columns in re.findall(r"^\| ([A-Z]+)(?:, at first)? \| (.*?) \| (.*?) \|$", SPEC, re.MULTILINE):
        for kind, target in re.findall(r"`(\w+)`(?: → ([A-Z]+))?", " ".join(columns)):
            said[state, re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower()] = target or state
    assert {(State[state], kind): State[target] for (state, kind), target in said.items()} == dict(MOVES)
