"""A safetensors file: the entries of its header, and the bytes of the tensors asked for.

Reading is parsing a header and copying bytes. Every number in the header is checked against the file's size before it
is believed. Nothing here keeps a file mapped, so the memory of a process is that of the tensors it holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petals.models.errors import CheckpointError

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_BYTES: Mapping[str, int] = {name: dtype.itemsize for name, dtype in _DTYPES.items()}
"""Names of dtypes in safetensors files, and bytes of one element."""
_MAX_HEADER_BYTES = 100 << 20
"""The limit of the safetensors format itself."""
_SAMPLE_BYTES = 4096
_SAMPLES = 4
"""The digest looks at this many pieces of every block tensor, evenly spread from its first to its last byte."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file: where it is and what it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the start of the file."""
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises: CheckpointError for a dtype that is not supported."""
        dtype = _DTYPES.get(self.dtype)
        if dtype is None:
            raise CheckpointError(f"{self.name} is stored as {self.dtype}, which is not supported")
        return dtype

    def part(self, index: int) -> TensorEntry:
        """The entry of `tensor[index]`. Raises: CheckpointError when there is none."""
        if len(self.shape) < 1 or not 0 <= index < self.shape[0]:
            raise CheckpointError(f"{self.name} has shape {list(self.shape)}; there is no part {index}")
        nbytes = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], offset=self.offset + index * nbytes, nbytes=nbytes)


def parse_header(shard: Any, what: str) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file. Raises CheckpointError when it is none, or is shorter than it says."""
    total = os.fstat(shard.fileno()).st_size
    head = shard.read(8)
    size = struct.unpack("<Q", head)[0] if len(head) == 8 else total
    if 8 + size > total or size > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{what} is no safetensors file (or a Git LFS pointer, or cut short)")
    entries: dict[str, TensorEntry] = {}
    try:
        for name, entry in json.loads(shard.read(size)).items():
            if name == "__metadata__":
                continue
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if not isinstance(dtype, str) or not all(type(number) is int for number in (begin, end, *shape)):
                raise ValueError(f"{name} has no dtype, shape and place")
            entries[name] = TensorEntry(name, dtype, shape, 8 + size + begin, end - begin)
            if not 0 <= begin <= end <= total - 8 - size:
                raise CheckpointError(f"{what} is cut short: {name} ends beyond the file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{what} has a damaged header: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"
        ) from error
    return entries


def is_whole_shard(path: Path) -> bool:
    """Whether a safetensors file is there and has all the bytes that its header says."""
    try:
        with path.open("rb", buffering=0) as shard:
            parse_header(shard, path.name)
    except (OSError, CheckpointError):
        return False
    return True


def read_tensor(shard: Any, entry: TensorEntry) -> Tensor:
    """Into memory of its own. Raises: CheckpointError for sizes that contradict each other, and a file cut short."""
    dtype = entry.torch_dtype
    if min(entry.shape, default=0) < 0 or math.prod(entry.shape) * dtype.itemsize != entry.nbytes:
        raise CheckpointError(f"{entry.name} takes {entry.nbytes} bytes, its shape {list(entry.shape)} says otherwise")
    tensor = torch.empty(entry.shape, dtype=dtype)
    if entry.nbytes == 0:
        return tensor
    into = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    shard.seek(entry.offset)
    done = 0
    while done < entry.nbytes:
        got = shard.readinto(into[done:])
        if not got:
            raise CheckpointError(f"{entry.name}: the file ended after {done} of {entry.nbytes} bytes")
        done += got
    return tensor


def sample_hash(shard: Any, entry: TensorEntry, place: tuple[int, str]) -> str:
    """What the digest of a local directory says about one tensor; `place`: its block, its name there."""
    spoken = json.dumps([*place, entry.dtype, list(entry.shape)]).encode()
    hashed = hashlib.sha256(spoken)
    last = max(0, entry.nbytes - _SAMPLE_BYTES)
    for offset in sorted({last * piece // (_SAMPLES - 1) for piece in range(_SAMPLES)}):
        shard.seek(entry.offset + offset)
        hashed.update(shard.read(min(_SAMPLE_BYTES, entry.nbytes - offset)))
    return hashed.hexdigest()
