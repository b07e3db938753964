"""A look at a GGUF file before the library's reader gets it, which believes every number in it.

A count of 2^60 in a file of 100 bytes keeps that reader busy for ever, a claimed size makes it ask for terabytes, and
what it raises on the way is no error of anybody's. So the header is walked here first: every length must fit into the
file, every count into a limit, every tensor's bytes behind the header. Nothing is kept but what bounds the model.

    magic "GGUF" | version u32 | tensors u64 | entries u64 | entries | tensor infos | padding | tensors
    entry: key string | kind u32 | value          string: length u64, bytes       array: kind u32, count u64, values
    tensor info: name string | dimensions u32 | size u64 each | type u32 | offset u64         all little-endian
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from petals.models.errors import CheckpointError

VERSIONS = (2, 3)
MAX_ENTRIES, MAX_TENSORS = 4096, 1 << 16
MAX_NAME_BYTES = 1024
MAX_TEXT_BYTES = 64
MAX_ARRAY = 1 << 22
"""Values of one array, such as the tokens of a vocabulary; the reader makes an object of each."""
MAX_BLOCKS, MAX_WIDENING = 4096, 64
"""Blocks, and how many times wider than a hidden state a feed-forward layer may claim to be."""

_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_INTEGERS = {2: "<H", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}


_Found = TypeVar("_Found")
Stored = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor is, and what."""

    kind: str
    """ggml's name of its type."""
    shape: tuple[int, ...]
    """In torch's order: of a matrix (out, in)."""
    offset: int
    """From the start of the file."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a header says that makes sense."""

    values: Mapping[str, int | str | None]
    """Entries that are integers, or short texts; None: it is there, and something else."""
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Raise CheckpointError unless it makes sense. Whether it describes a model is for `check_model`."""
    return _walk(path, lambda header: header.read())


def check_gguf(path: Path) -> Stored:
    """Raise CheckpointError unless the header of a GGUF file makes sense.

    Returns: what its matrices are worth being kept in: the dtype of most of their weights, float16 if those are
        quantised. A router or a few experts' gates in float32 among them change nothing.
    """
    return _walk(path, lambda header: header.check())


def _walk(path: Path, look: Callable[[_Header], _Found]) -> _Found:
    try:
        with path.open("rb") as file:
            return look(_Header(file, path.stat().st_size))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # UnicodeDecodeError too
        raise CheckpointError(f"{path} is no usable GGUF file: {error}") from None


class _Header:
    def __init__(self, file: BinaryIO, total: int) -> None:
        self._file = file
        self._total = total

    def check(self) -> Stored:
        header = self.read()
        kinds: dict[str, int] = {}
        for tensor in header.tensors.values():
            if len(tensor.shape) > 1:
                kinds[tensor.kind] = kinds.get(tensor.kind, 0) + math.prod(tensor.shape)
        check_model(header)
        usual = max(kinds, key=lambda kind: kinds[kind], default="F32")
        return "float32" if usual in ("F32", "F64") else "bfloat16" if usual == "BF16" else "float16"

    def read(self) -> GgufHeader:
        if self._take(4) != b"GGUF" or self._number("<I") not in VERSIONS:
            raise ValueError("it does not begin as one of version 2 or 3")
        tensors, entries = self._number("<Q"), self._number("<Q")
        if tensors > MAX_TENSORS or entries > MAX_ENTRIES:
            raise ValueError(f"{tensors} tensors and {entries} entries")
        values: dict[str, int | str | None] = {}
        for _ in range(entries):
            key = self._name()
            if key in values or key.startswith("GGUF."):
                raise ValueError(f"{key} stands there twice")
            values[key] = self._value()
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment}")
        tensors_found: dict[str, GgufTensor] = {}
        for _ in range(tensors):
            name, tensor = self._tensor()
            if name in tensors_found:
                raise ValueError(f"tensor {name} stands there twice")
            tensors_found[name] = tensor
        begin = -(-self._file.tell() // alignment) * alignment
        for name, tensor in tensors_found.items():
            if tensor.offset % alignment or begin + tensor.offset + tensor.nbytes > self._total:
                raise ValueError(f"tensor {name} ends beyond the file")
        placed = {name: replace(tensor, offset=begin + tensor.offset) for name, tensor in tensors_found.items()}
        return GgufHeader(values, placed)

    def _value(self) -> int | str | None:
        """An integer or a short text; of everything else only that it is there."""
        kind = self._number("<I")
        if kind in _INTEGERS:
            return self._number(_INTEGERS[kind])
        if kind == _STRING:
            size = self._number("<Q")
            if size <= MAX_TEXT_BYTES:
                return self._take(size).decode(errors="replace")
            self._skip(size)
        elif kind == _ARRAY:
            of, count = self._number("<I"), self._number("<Q")
            if count > MAX_ARRAY:
                raise ValueError(f"an array of {count}")
            if of == _STRING:
                for _ in range(count):
                    self._skip(self._number("<Q"))
            else:
                self._skip(count * self._scalar_bytes(of))
        else:
            self._skip(self._scalar_bytes(kind))
        return None

    def _tensor(self) -> tuple[str, GgufTensor]:
        """Name and tensor; its offset from the first tensor's place."""
        name, dimensions = self._name(), self._number("<I")
        if not 0 < dimensions <= 4:
            raise ValueError(f"tensor {name} of {dimensions} dimensions")
        sizes = tuple(self._number("<Q") for _ in range(dimensions))
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in set(GGMLQuantizationType):
            raise ValueError(f"tensor {name} of type {kind}")
        per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if not all(sizes) or sizes[0] % per_block:
            raise ValueError(f"tensor {name} of sizes {sizes}")
        nbytes = math.prod(sizes) // per_block * block_bytes
        return name, GgufTensor(GGMLQuantizationType(kind).name, sizes[::-1], offset, nbytes)

    def _name(self) -> str:
        size = self._number("<Q")
        if size > MAX_NAME_BYTES:
            raise ValueError(f"a name of {size} bytes")
        return self._take(size).decode()

    def _scalar_bytes(self, kind: int) -> int:
        if kind not in _SCALAR_BYTES:
            raise ValueError(f"a value of kind {kind}")
        return _SCALAR_BYTES[kind]

    def _number(self, form: str) -> int:
        (number,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(number)

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise ValueError("it is cut short")
        return data

    def _skip(self, size: int) -> None:
        if size > self._total - self._file.tell():
            raise ValueError("it is cut short")
        self._file.seek(size, 1)


def check_model(header: GgufHeader) -> None:
    """Raise ValueError unless the sizes that a model is built by are those of the tensors that are there."""
    tensors = header.tensors
    blocks = {int(found[1]) for name in tensors if (found := re.match(r"blk\.([0-9]{1,5})\.", name))}
    widths = {size for tensor in tensors.values() for size in tensor.shape}
    for key, number in header.values.items():
        what = key.partition(".")[2]
        if what == "rope.scaling.type" and number != "none":
            raise ValueError(f"its rotary embedding is scaled ({number}), which transformers would not do")
        if not isinstance(number, int):
            continue
        if what == "block_count" and not 0 < number <= min(MAX_BLOCKS, len(blocks)):
            raise ValueError(f"{number} blocks claimed, tensors of {len(blocks)} are there")
        if what == "embedding_length" and number not in widths:
            raise ValueError(f"no tensor is {number} wide, as {key} says")
        if what.endswith("feed_forward_length") and not 0 < number <= MAX_WIDENING * max(widths, default=0):
            raise ValueError(f"{key} is {number}")
