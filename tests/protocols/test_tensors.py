"""Tensors on the wire: exact where they promise it, refused before anything is allocated where they lie."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import LocalProtocolError, RemoteProtocolError
from petals.protocols.tensors import (
    BOOL,
    DTYPES,
    ENCODINGS,
    FLOATS,
    INT64,
    MAX_TENSOR_BYTES,
    WIRE_DTYPES,
    check_header,
    decode_tensor,
    encode_tensor,
)

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4)


def made(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 1000).to(dtype)


def travel(tensor: Tensor, encoding: pb.Encoding = pb.RAW) -> Tensor:
    header, pieces = encode_tensor(tensor, encoding)
    header = pb.Tensor.FromString(header.SerializeToString())
    payload = bytearray(b"".join(pieces))
    assert check_header(header, name="x", shape=tuple(tensor.shape), dtypes=(tensor.dtype,)) == len(payload)
    return decode_tensor(header, payload)


@given(SHAPES, st.sampled_from(sorted(DTYPES.values(), key=str)), st.integers(0, 99), st.booleans())
def test_raw_tensors_arrive_bit_for_bit(shape: list[int], dtype: torch.dtype, seed: int, strided: bool) -> None:
    tensor = made(shape, dtype, seed)
    if strided:
        tensor = tensor.transpose(0, -1)
    torch.testing.assert_close(travel(tensor), tensor, rtol=0, atol=0)


@given(SHAPES, st.sampled_from(FLOATS), st.integers(0, 99), st.integers(-12, 12), st.booleans())
def test_int8_errs_by_half_a_scale_at_most(
    shape: list[int], dtype: torch.dtype, seed: int, exponent: int, strided: bool
) -> None:
    """|error| <= scale / 2, with scale = max|row| / 127; besides, half a unit in the last place of the dtype."""
    tensor = (made(shape, torch.float32, seed) / 1000 * 2.0**exponent).to(dtype)
    if strided:
        tensor = tensor.transpose(0, -1)
    exact = tensor.double()
    scale = exact.abs().amax(dim=-1, keepdim=True) / 127
    error = (travel(tensor, pb.BLOCKWISE_INT8).double() - exact).abs()
    bound = scale / 2 * (1 + 2**-20) + half_an_ulp(exact.abs() + scale / 2, dtype)
    assert bool((error <= bound).all())


@given(SHAPES, st.sampled_from(FLOATS), st.integers(0, 99), st.integers(-24, 12), st.booleans())
def test_float16_errs_by_its_own_rounding(
    shape: list[int], dtype: torch.dtype, seed: int, exponent: int, strided: bool
) -> None:
    """|error| <= 2**-11 |x|, or 2**-25 below float16's normal range. Exact for float16, for bfloat16 in that range."""
    tensor = (made(shape, torch.float32, seed) / 1000 * 2.0**exponent).to(dtype)
    if strided:
        tensor = tensor.transpose(0, -1)
    exact, got = tensor.double(), travel(tensor, pb.AS_FLOAT16).double()
    assert bool(((got - exact).abs() <= (exact.abs() * 2**-11).clamp(min=2**-25)).all())
    lossless = exact.abs() >= (0 if dtype is torch.float16 else 2**-14 if dtype is torch.bfloat16 else torch.inf)
    assert torch.equal(got[lossless], exact[lossless])


def half_an_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return values * (info.eps / 2) + info.smallest_normal * info.eps / 2


def test_zeros_and_giants_survive_encoding() -> None:
    tensor = torch.tensor([[0.0, 0.0], [1e30, -1e30]])
    assert torch.equal(travel(tensor, pb.BLOCKWISE_INT8)[0], torch.zeros(2))
    assert travel(tensor, pb.AS_FLOAT16)[1].tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite(value: float) -> None:
    tensor = torch.tensor([[value, 1.0], [3.0, 1.0]])
    assert repr(travel(tensor).tolist()) == repr(tensor.tolist())
    int8 = travel(tensor, pb.BLOCKWISE_INT8)
    assert not int8[0].isfinite().any()  # loudly, the whole row
    torch.testing.assert_close(int8[1], tensor[1], rtol=0, atol=3 / 127 / 2)
    half = travel(tensor, pb.AS_FLOAT16)[0, 0]
    assert half.isnan() if value != value else half == (65504.0 if value > 0 else -65504.0)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_a_scalar_travels(dtype: torch.dtype, encoding: pb.Encoding) -> None:
    assert travel(torch.tensor(1, dtype=dtype), encoding) == torch.tensor(1, dtype=dtype)


@pytest.mark.parametrize("encoding", [*ENCODINGS, 3, 99])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_the_header_says_what_was_done_whatever_was_wished_for(dtype: torch.dtype, encoding: pb.Encoding) -> None:
    tensor = made([2, 3], dtype, 1)
    header, _ = encode_tensor(tensor, encoding)
    assert header.encoding == (encoding if encoding in ENCODINGS and dtype in FLOATS else pb.RAW)
    if header.encoding == pb.RAW:
        assert torch.equal(travel(tensor, encoding), tensor)


def test_no_copy_is_made_of_what_may_be_shared() -> None:
    tensor = torch.zeros(2, 3)
    _, pieces = encode_tensor(tensor)
    payload = bytearray(b"".join(pieces))
    arrived = decode_tensor(pb.Tensor(dtype=pb.FLOAT32, shape=[2, 3]), payload)
    tensor[0, 0], arrived[0, 1] = 1.0, 1.0
    assert bytes(pieces[0][:4]) == bytes(payload[4:8]) == b"\x00\x00\x80\x3f"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_wants_a_gradient_travels_without_it(encoding: pb.Encoding) -> None:
    assert travel(torch.ones(2, requires_grad=True), encoding).tolist() == [1.0, 1.0]


@settings(max_examples=300)
@given(
    st.integers(-1, 9),
    st.lists(st.integers(0, 5) | st.integers(0, 2**32 - 1), max_size=6) | st.lists(st.integers(1, 2), max_size=70),
    st.integers(-1, 4),
    st.lists(st.none() | st.integers(1, 4), max_size=4),
    st.sampled_from([FLOATS, INT64, BOOL]),
    st.sampled_from([64, MAX_TENSOR_BYTES]),
)
def test_a_header_is_as_wanted_or_refused_by_name(
    dtype: int,
    shape: list[int],
    encoding: int,
    wanted: list[int | None],
    dtypes: tuple[torch.dtype, ...],
    max_bytes: int,
) -> None:
    header = pb.Tensor(dtype=dtype, shape=shape, encoding=encoding)  # type: ignore[arg-type]
    try:
        size = check_header(header, name="hidden", shape=wanted, dtypes=dtypes, max_bytes=max_bytes)
    except RemoteProtocolError as error:
        said = str(error)
        assert said.startswith("hidden: ") and len(said) < 500  # noqa: PT018  # one of two right answers
    else:
        assert 0 < size <= max_bytes
        assert DTYPES[dtype] in dtypes
        assert len(shape) == len(wanted)
        assert all(got >= 1 and want in (None, got) for got, want in zip(shape, wanted, strict=True))
        if size <= 1 << 16:
            assert tuple(decode_tensor(header, bytearray(size)).shape) == tuple(shape)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (pb.Tensor(shape=[2, 3]), "dtype 0 instead of float32 or bfloat16 or float16"),
        (pb.Tensor(dtype=pb.INT64, shape=[2, 3]), "instead of float32"),
        (pb.Tensor(dtype=77, shape=[2, 3]), "dtype 77"),  # type: ignore[arg-type]
        (pb.Tensor(dtype=pb.FLOAT32), r"shape \(\) instead of \(any, 3\)"),
        (pb.Tensor(dtype=pb.FLOAT32, shape=[2]), "shape"),
        (pb.Tensor(dtype=pb.FLOAT32, shape=[2, 4]), "shape"),
        (pb.Tensor(dtype=pb.FLOAT32, shape=[0, 3]), "shape"),
        (pb.Tensor(dtype=pb.FLOAT32, shape=[1] * 10_000), "shape of 10000 dimensions"),
        (pb.Tensor(dtype=pb.FLOAT32, shape=[2, 3], encoding=3), "encoding 3"),  # type: ignore[arg-type]
        (pb.Tensor(dtype=pb.FLOAT32, shape=[2**32 - 1, 3]), "over the limit"),
        (pb.Tensor(dtype=pb.BFLOAT16, shape=[2**32 - 1, 3], encoding=pb.BLOCKWISE_INT8), "over the limit"),
    ],
)
def test_each_lie_has_its_name(header: pb.Tensor, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        check_header(header, name="hidden", shape=(None, 3))


@pytest.mark.parametrize("dtypes", [INT64, BOOL])
@pytest.mark.parametrize("encoding", [pb.AS_FLOAT16, pb.BLOCKWISE_INT8])
def test_only_floats_may_be_encoded(dtypes: tuple[torch.dtype, ...], encoding: pb.Encoding) -> None:
    header = pb.Tensor(dtype=WIRE_DTYPES[dtypes[0]], shape=[2], encoding=encoding)
    with pytest.raises(RemoteProtocolError, match="encoding"):
        check_header(header, name="rows", shape=(2,), dtypes=dtypes)


@pytest.mark.parametrize(
    ("dtype", "encoding", "most"),
    [  # elements in a row: 256 MiB on the wire, and never more than 2**27 of them
        (pb.FLOAT32, pb.RAW, 2**26),
        (pb.BFLOAT16, pb.RAW, 2**27),
        (pb.FLOAT32, pb.AS_FLOAT16, 2**27),
        (pb.FLOAT32, pb.BLOCKWISE_INT8, 2**27),
        (pb.INT64, pb.RAW, 2**25),
        (pb.BOOL, pb.RAW, 2**27),
    ],
)
def test_the_limit_is_where_the_specification_says(dtype: pb.DType, encoding: pb.Encoding, most: int) -> None:
    every = tuple(WIRE_DTYPES)
    fits = pb.Tensor(dtype=dtype, shape=[most], encoding=encoding)
    check_header(fits, name="x", shape=(None,), dtypes=every)
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        check_header(pb.Tensor(dtype=dtype, shape=[most + 1], encoding=encoding), name="x", shape=(None,), dtypes=every)


def test_a_giant_is_refused_before_anything_is_allocated() -> None:
    giants = [
        pb.Tensor(dtype=dtype, shape=shape, encoding=encoding)
        for dtype in (pb.FLOAT32, pb.BFLOAT16)
        for encoding in ENCODINGS
        for shape in ([2**31] * 3, [2**32 - 1] * 3, [2**16, 2**16, 1], [1, 1, 2**28])
    ]
    tracemalloc.start()
    try:
        for header in giants:
            with pytest.raises(RemoteProtocolError, match="over the limit"):
                check_header(header, name="hidden", shape=(None, None, None))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1, dtype=torch.complex64), torch.zeros(1, 1, 1, 1, 1), torch.zeros(0), torch.zeros(3, 0)],
)
def test_what_has_no_form_on_the_wire_is_our_own_bug(tensor: Tensor, encoding: pb.Encoding) -> None:
    with pytest.raises(LocalProtocolError):
        encode_tensor(tensor, encoding)


def test_any_byte_but_zero_is_true() -> None:
    header = pb.Tensor(dtype=pb.BOOL, shape=[4])
    assert decode_tensor(header, bytearray([0, 1, 2, 255])).tolist() == [False, True, True, True]
