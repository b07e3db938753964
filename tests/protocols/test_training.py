"""Forward and backward requests: the payload that may follow, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import ProtocolViolation, RemoteProtocolError
from petals.protocols.inference import MAX_BATCH_SIZE, MAX_LENGTH
from petals.protocols.lora import MAX_LORA_LAYERS, MAX_PATH, MAX_RANK
from petals.protocols.tensors import MAX_TENSOR_BYTES, encode_tensor
from petals.protocols.training import request_payload

DIGEST = "ab" * 32
SHAPES = {
    "hidden": torch.zeros(2, 3, 8),
    "attention_mask": torch.ones(2, 3, dtype=torch.bool),
    "prompts": torch.zeros(4, 2, 2, 8),
    "grad_output": torch.zeros(2, 3, 8),
}
OPTIONAL = ("attention_mask", "prompts")


def request(*names: str, **changes: object) -> pb.TrainingRequest:
    made = pb.TrainingRequest(model_digest=DIGEST, start_block=0, end_block=4)
    for name in names:
        getattr(made, name).CopyFrom(encode_tensor(SHAPES[name])[0])
    made.MergeFrom(pb.TrainingRequest(**changes))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("optional", [(), ("attention_mask",), ("prompts",), OPTIONAL])
@pytest.mark.parametrize("backward", [False, True])
def test_the_payload_in_the_order_of_the_fields(optional: tuple[str, ...], backward: bool) -> None:
    names = ["hidden", *optional, *(["grad_output"] if backward else [])]
    plan = request_payload(request(*reversed(names)), 8, backward=backward)
    assert [(name, size) for name, _, size in plan] == [
        (name, SHAPES[name].numel() * SHAPES[name].element_size()) for name in names
    ]


def test_a_gradient_belongs_to_backward_and_only_there() -> None:
    with pytest.raises(RemoteProtocolError, match="grad_output"):
        request_payload(request("hidden"), 8, backward=True)
    with pytest.raises(RemoteProtocolError, match="grad_output"):
        request_payload(request("hidden", "grad_output"), 8, backward=False)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("hidden", torch.zeros(2, 3, 9)),
        ("hidden", torch.zeros(2, 8)),
        ("hidden", torch.zeros(1, 2, 3, 8)),
        ("hidden", torch.zeros(2, 3, 8, dtype=torch.int64)),
        ("attention_mask", torch.ones(2, 4, dtype=torch.bool)),
        ("attention_mask", torch.ones(2, 3)),
        ("attention_mask", torch.ones(2, 3, dtype=torch.int64)),
        ("prompts", torch.zeros(3, 2, 2, 8)),  # one block too few
        ("prompts", torch.zeros(4, 1, 2, 8)),
        ("prompts", torch.zeros(4, 2, 4, 8)),  # longer than the sequence
        ("prompts", torch.zeros(4, 2, 2, 9)),
        ("grad_output", torch.zeros(2, 4, 8)),
        ("grad_output", torch.zeros(2, 3, 8, dtype=torch.bool)),
    ],
)
def test_one_wrong_tensor(name: str, wrong: torch.Tensor) -> None:
    broken = request(*SHAPES)
    getattr(broken, name).CopyFrom(encode_tensor(wrong)[0])
    with pytest.raises(RemoteProtocolError, match=name):
        request_payload(broken, 8, backward=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_digest": "AB" * 32},
        {"model_digest": "ab" * 31},
        {"start_block": 4},
        {"start_block": 5},
        {"end_block": 4097},
    ],
)
def test_what_no_model_has(changes: dict[str, object]) -> None:
    with pytest.raises(ProtocolViolation):
        request_payload(request("hidden", **changes), 8, backward=False)


@pytest.mark.parametrize(("batch", "tokens"), [(MAX_BATCH_SIZE, 1), (1, MAX_LENGTH)])
def test_limits_are_inclusive(batch: int, tokens: int) -> None:
    def of(batch: int, tokens: int) -> pb.TrainingRequest:
        return request(hidden=pb.Tensor(dtype=pb.FLOAT32, shape=[batch, tokens, 8]))

    request_payload(of(batch, tokens), 8, backward=False)
    beyond = (batch + 1, tokens) if tokens == 1 else (batch, tokens + 1)
    with pytest.raises(RemoteProtocolError, match="allowed are"):
        request_payload(of(*beyond), 8, backward=False)


def low_rank(block: int = 1, path: str = "q", a: tuple[int, ...] = (2, 8), b: tuple[int, ...] = (6, 2)) -> pb.LowRank:
    return pb.LowRank(
        block=block, path=path, a=encode_tensor(torch.zeros(a))[0], b=encode_tensor(torch.zeros(b))[0], scaling=2.0
    )


def test_factors_follow_in_order() -> None:
    wanted = request("hidden", "grad_output", lora=[low_rank(0), low_rank(3, "v", (1, 8), (8, 1))])
    plan = request_payload(wanted, 8, backward=True)
    assert [(name, size) for name, _, size in plan[2:]] == [
        ("lora.0.a", 64), ("lora.0.b", 48), ("lora.1.a", 32), ("lora.1.b", 32)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ([low_rank(4)], "not asked for"),
        ([low_rank(), low_rank()], "twice"),
        ([low_rank(path="")], "not asked for"),
        ([low_rank(path="q" * (MAX_PATH + 1))], "not asked for"),
        ([low_rank(b=(6, 3))], "lora b: shape"),
        ([low_rank(a=(2, 8, 1))], "lora a: shape"),
        ([low_rank(a=(MAX_RANK + 1, 1), b=(1, MAX_RANK + 1))], "rank 1025"),
        ([low_rank(path=str(index)) for index in range(MAX_LORA_LAYERS + 1)], "513 layers"),
    ],
)
def test_updates_that_cannot_be(lora: list[pb.LowRank], says: str) -> None:
    with pytest.raises(RemoteProtocolError, match=says):
        request_payload(request("hidden", lora=lora), 8, backward=False)


HEADERS = st.builds(
    lambda dtype, shape, encoding: pb.Tensor(dtype=dtype, shape=shape, encoding=encoding),
    st.integers(0, 6),
    st.lists(st.integers(0, 8) | st.integers(0, 2**32 - 1), max_size=5),
    st.integers(0, 3),
)


@settings(max_examples=300)
@given(
    good=st.sets(st.sampled_from(sorted(SHAPES))),
    bad=st.fixed_dictionaries({}, optional=dict.fromkeys(SHAPES, HEADERS)),
    blocks=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)) | st.just((0, 4)),
    hidden_size=st.sampled_from([1, 8, 1 << 16]),
    backward=st.booleans(),
)
def test_no_header_gets_past_the_plan(
    good: set[str], bad: dict[str, pb.Tensor], blocks: tuple[int, int], hidden_size: int, backward: bool
) -> None:
    wild = request(*good)
    wild.start_block, wild.end_block = blocks
    for name, header in bad.items():
        getattr(wild, name).CopyFrom(header)
    try:
        plan = request_payload(wild, hidden_size, backward=backward)
    except (ProtocolViolation, RemoteProtocolError):
        return
    assert blocks[0] < blocks[1] <= 4096
    assert [name for name, _, _ in plan] == [name for name in SHAPES if wild.HasField(name)]  # type: ignore[arg-type]
    assert wild.hidden.shape[2] == hidden_size
    assert all(0 < size <= MAX_TENSOR_BYTES for _, _, size in plan)
