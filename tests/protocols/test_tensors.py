"""Tensors on the wire: exact where they promise it, refused before anything is allocated where they lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import LocalProtocolError, RemoteProtocolError
from petals.protocols.tensors import DTYPES, FLOATS, MAX_TENSOR_BYTES, check_header, decode_tensor, encode_tensor

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


@given(SHAPES, st.sampled_from(FLOATS), st.integers(0, 99))
def test_int8_errs_by_half_a_scale_at_most(shape: list[int], dtype: torch.dtype, seed: int) -> None:
    tensor = made(shape, dtype, seed)
    bound = tensor.float().abs().amax(dim=-1, keepdim=True) / 127 / 2
    error = (travel(tensor, pb.BLOCKWISE_INT8).float() - tensor.float()).abs()
    rounding = tensor.float().abs() * torch.finfo(dtype).eps
    assert bool((error <= bound * 1.001 + rounding + 1e-6).all())


@given(SHAPES, st.sampled_from(FLOATS), st.integers(0, 99))
def test_float16_errs_by_its_own_rounding(shape: list[int], dtype: torch.dtype, seed: int) -> None:
    tensor = made(shape, dtype, seed)
    torch.testing.assert_close(travel(tensor, pb.AS_FLOAT16), tensor, rtol=2**-10 + 2**-8, atol=1e-6)


def test_zeros_and_giants_survive_encoding() -> None:
    tensor = torch.tensor([[0.0, 0.0], [1e30, -1e30]])
    assert torch.equal(travel(tensor, pb.BLOCKWISE_INT8)[0], torch.zeros(2))
    assert travel(tensor, pb.AS_FLOAT16)[1].tolist() == [65504.0, -65504.0]


@settings(max_examples=300)
@given(
    st.integers(0, 9),
    st.lists(st.integers(0, 2**32 - 1), max_size=70),
    st.integers(0, 5),
    st.integers(0, 4),
)
def test_a_lying_header_is_refused_by_name(dtype: int, shape: list[int], encoding: int, n_expected: int) -> None:
    header = pb.Tensor(dtype=dtype, shape=shape, encoding=encoding)  # type: ignore[arg-type]
    try:
        size = check_header(header, name="hidden", shape=(None,) * n_expected, dtypes=FLOATS)
    except RemoteProtocolError as error:
        assert str(error).startswith("hidden: ")  # noqa: PT017  # raising is one of two right answers
    else:
        assert size <= MAX_TENSOR_BYTES
        assert len(shape) == n_expected
        assert all(shape)


def test_a_giant_is_refused_before_its_buffer_exists() -> None:
    header = pb.Tensor(dtype=pb.FLOAT32, shape=[2**31, 2**31, 2**31])
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        check_header(header, name="hidden", shape=(None, None, None))


def test_what_has_no_form_on_the_wire_is_our_own_bug() -> None:
    with pytest.raises(LocalProtocolError):
        encode_tensor(torch.zeros(1, dtype=torch.complex64))


def test_any_byte_but_zero_is_true() -> None:
    header = pb.Tensor(dtype=pb.BOOL, shape=[4])
    assert decode_tensor(header, bytearray([0, 1, 2, 255])).tolist() == [False, True, True, True]
