"""A tensor as peers exchange it: a small header in the message, raw bytes behind it.

Nothing here believes a number from the wire before it is checked: dtype and encoding against a table, shape against
what the caller expects, and the byte count that follows from them against the caller's limit. Only then is a buffer
allocated.

Encodings (`messages.proto`): RAW is exact. AS_FLOAT16 rounds to half precision (overflow, infinities too, is clipped
to its largest finite value). BLOCKWISE_INT8 stores each row of the last dimension as round(x / scale) with
scale = max|x| / 127, so that the error of a value is at most half of its row's scale, besides the rounding of the
dtype; of a row that is not finite no value arrives finite. A tensor without elements does not travel.
"""

from __future__ import annotations

import hashlib
import math
import struct
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import LocalProtocolError, RemoteProtocolError

DTYPES: dict[int, torch.dtype] = {
    pb.FLOAT32: torch.float32,
    pb.BFLOAT16: torch.bfloat16,
    pb.FLOAT16: torch.float16,
    pb.INT64: torch.int64,
    pb.BOOL: torch.bool,
}
WIRE_DTYPES: dict[torch.dtype, pb.DType] = {
    torch.float32: pb.FLOAT32,
    torch.bfloat16: pb.BFLOAT16,
    torch.float16: pb.FLOAT16,
    torch.int64: pb.INT64,
    torch.bool: pb.BOOL,
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
FLOATS_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
"""As records and command lines name them."""
INT64 = (torch.int64,)
BOOL = (torch.bool,)
COMPRESSIONS = {"none": pb.RAW, "float16": pb.AS_FLOAT16, "int8": pb.BLOCKWISE_INT8}
"""How hidden states travel, as people say it. "none" is exact."""
ENCODINGS = tuple(COMPRESSIONS.values())

MAX_DIMENSIONS = 4
MAX_TENSOR_BYTES = 256 << 20
"""One tensor, as it travels: a forward pass of 16 rows of 2,048 tokens at hidden size 2,048 in float32."""

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("tensors travel in little-endian order and are not swapped: this machine is big-endian")


def encode_tensor(
    tensor: Tensor, encoding: pb.Encoding = pb.RAW, *, header: pb.Tensor | None = None
) -> tuple[pb.Tensor, list[memoryview]]:
    """`tensor` as (header, pieces of payload); the pieces share memory with it where it is contiguous on the CPU.

    Args:
        encoding: a wish. It is RAW all the same where the dtype is no float, or where a newer peer wished for an
            encoding that we do not know: the header says what was done.
        header: an empty one, of the message it belongs to, to be filled instead of a new one.
    Raises:
        LocalProtocolError: a dtype, number of dimensions or size 0 that cannot travel.
    """
    wire_dtype = WIRE_DTYPES.get(tensor.dtype)
    if wire_dtype is None or tensor.dim() > MAX_DIMENSIONS or not tensor.numel():
        raise LocalProtocolError(f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)} has no form on the wire")
    if encoding not in ENCODINGS or tensor.dtype not in FLOATS:
        encoding = pb.RAW
    if header is None:
        header = pb.Tensor()
    header.dtype, header.encoding = wire_dtype, encoding
    header.shape.extend(tensor.shape)
    if encoding == pb.RAW:
        return header, [_bytes_of(tensor)]
    tensor = tensor.detach().to("cpu")
    if encoding == pb.AS_FLOAT16:
        limit = torch.finfo(torch.float16).max
        return header, [_bytes_of(tensor.float().clamp(-limit, limit).half())]
    rows = tensor.float().reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.float().reshape(1, 1)
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return header, [_bytes_of(scale), _bytes_of((rows / scale).round().to(torch.int8))]


def check_header(
    header: pb.Tensor,
    *,
    name: str,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype] = FLOATS,
    max_bytes: int = MAX_TENSOR_BYTES,
) -> int:
    """The number of payload bytes of a tensor that is about to arrive.

    Args:
        header: as received; nothing in it has been checked.
        name: how the error message calls the tensor.
        shape: what it must be; None stands for any positive size.
        dtypes: what may come.
        max_bytes: refuse more than this on the wire, and more than twice as much as float32 in memory.
    Raises:
        RemoteProtocolError: anything else than that.
    """
    dtype = DTYPES.get(header.dtype)
    if dtype is None or dtype not in dtypes:
        wanted = " or ".join(str(each).removeprefix("torch.") for each in dtypes)
        raise RemoteProtocolError(f"{name}: dtype {dtype or header.dtype} instead of {wanted}")
    got = tuple(header.shape)
    if len(got) != len(shape) or any(
        size < 1 or (want is not None and size != want) for size, want in zip(got, shape, strict=True)
    ):
        described = ", ".join("any" if want is None else str(want) for want in shape)
        raise RemoteProtocolError(f"{name}: shape {_short(got)} instead of ({described})")
    if header.encoding not in ENCODINGS or (header.encoding != pb.RAW and dtype not in FLOATS):
        raise RemoteProtocolError(f"{name}: encoding {header.encoding} of {dtype}")
    numel = math.prod(got)  # Python ints: no overflow to hide behind
    if numel * max(4, dtype.itemsize) > 2 * max_bytes or (on_wire := _wire_bytes(header, numel, dtype)) > max_bytes:
        raise RemoteProtocolError(f"{name}: shape {_short(got)} in {dtype} is over the limit of {max_bytes} bytes")
    return on_wire


def decode_tensor(header: pb.Tensor, payload: bytearray) -> Tensor:
    """The tensor behind a header that `check_header` has passed; RAW ones share memory with `payload`."""
    dtype, shape = DTYPES[header.dtype], tuple(header.shape)
    if header.encoding == pb.AS_FLOAT16:
        return torch.frombuffer(payload, dtype=torch.float16).reshape(shape).to(dtype)
    if header.encoding == pb.BLOCKWISE_INT8:
        rows = math.prod(shape[:-1])
        scale = torch.frombuffer(payload, dtype=torch.float32, count=rows).reshape(rows, 1)
        values = torch.frombuffer(payload, dtype=torch.int8, offset=4 * rows).reshape(rows, -1)
        return (values.float() * scale).reshape(shape).to(dtype)
    if dtype is torch.bool:  # any non-zero byte must mean one: torch takes the bytes as they are
        return torch.frombuffer(payload, dtype=torch.uint8).reshape(shape) != 0
    return torch.frombuffer(payload, dtype=dtype).view(shape)


def travelled(tensor: Tensor, encoding: pb.Encoding) -> Tensor:
    """What arrives at the other end when `tensor` is sent with this encoding."""
    if encoding == pb.RAW:
        return tensor
    header, pieces = encode_tensor(tensor, encoding)
    return tensor if header.encoding == pb.RAW else decode_tensor(header, bytearray(b"".join(pieces)))


def digest_tensor(tensor: Tensor) -> bytes:
    """SHA-256 of the shape and the values, whatever floating dtype they are held in: floats count as float32, which
    holds all of them."""
    shape = tensor.shape
    digest = hashlib.sha256(struct.pack(f"<{len(shape) + 1}I", len(shape), *shape))
    digest.update(_bytes_of(tensor.detach().float() if tensor.dtype in HALVES else tensor))
    return digest.digest()


def _wire_bytes(header: pb.Tensor, numel: int, dtype: torch.dtype) -> int:
    if header.encoding == pb.AS_FLOAT16:
        return 2 * numel
    if header.encoding == pb.BLOCKWISE_INT8:
        return numel + 4 * math.prod(header.shape[:-1])
    return numel * dtype.itemsize


def _bytes_of(tensor: Tensor) -> memoryview:
    """Its values, flat. In few calls of torch: behind a pass that has swept the caches each takes 20 to 40 us."""
    if tensor.dtype in HALVES:  # numpy has no bfloat16, and memoryviews know no half floats
        tensor = tensor.detach().view(torch.int16)
    return tensor.contiguous().numpy(force=True).data.cast("B")


def _short(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= 8 else f"of {len(shape)} dimensions"
