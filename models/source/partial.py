"""A checkpoint that comes section by section, in the user's cache: what is verified stays, whatever happens then.

    fetched/DIGEST/config.json, tokenizer.json ...      section FILES
    fetched/DIGEST/others.safetensors                   section OTHERS
    fetched/DIGEST/block-00003.safetensors              block 3; the loader reads them like any other shards
    fetched/DIGEST/block-00003.safetensors.partial      the same while pieces are missing
    fetched/DIGEST/model.safetensors.index.json         which tensor is in which, those that are not here yet too
    fetched/DIGEST/petals.json                          the digest's preimage; its being there makes it a checkpoint

File names are made here, from numbers and from the table of files that may be shared. A partial file has its full size
from the start; which of its pieces are right is found out by hashing, so that no journal can be wrong about it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petals.models.errors import CheckpointError, DocumentError
from petals.models.source.checkpoint import (
    INDEX,
    MANIFEST,
    MANIFEST_VERSION,
    Checkpoint,
    find_blocks,
)
from petals.models.source.disk import cache_directory, write_json
from petals.models.source.shard import TensorEntry, is_whole_shard, sample_hash
from petals.models.source.weights import FILES, FIRST_BLOCK, OTHERS, Index, Section, Voucher

MAX_BLOCKS = 4096
SPARE_BYTES = 256 << 20
"""Room on the disk that fetching leaves to others."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece that is missing, and where it goes."""

    section: int
    offset: int
    """In the partial file."""
    nbytes: int
    sha256: bytes


class PartialCheckpoint:
    """What is here of the model `digest`. Methods touch the disk: call them in a thread."""

    def __init__(self, digest: str, directory: Path | None = None) -> None:
        self.digest = digest
        self.directory = directory or cache_directory() / "fetched" / digest

    def has(self, section: int) -> bool:
        """Whether a section of tensors is complete: one that lost bytes since it was, in a crash say, is not."""
        return is_whole_shard(self.directory / _shard(section))

    def begin(self, section: int, content: Section, voucher: Voucher) -> PartialSection:
        """Make room for a section, or take up what an earlier attempt left.

        Raises: CheckpointError: the disk is full, or can not be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            name = "files" if section == FILES else _shard(section)
            return PartialSection(self.directory / f"{name}.partial", section, content, voucher)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.directory}: {error.strerror or error}") from error

    def describe(self, name: str, voucher: Voucher, index: Index) -> None:
        """Make a checkpoint of the files that are here: from now on it can be opened.

        Raises: DocumentError: the index does not fit the configuration or the digest. CheckpointError: a configuration
            that transformers does not know.
        """
        num_blocks = Checkpoint(name, self.directory).num_blocks
        blocks = find_blocks(index.names, range(num_blocks)) if num_blocks <= MAX_BLOCKS else None
        if blocks is None:
            raise DocumentError("an index that does not fit the configuration")
        for block, tensors in enumerate(blocks):
            voucher.check_names(block, (rest for _, rest in tensors))
        home = {tensor: _shard(FIRST_BLOCK + block) for block, tensors in enumerate(blocks) for tensor, _ in tensors}
        write_json(self.directory / INDEX, {"weight_map": {n: home.get(n, _shard(OTHERS)) for n in index.names}})
        said = {"identity": voucher.text, "licence": index.licence, "name": name}
        write_json(self.directory / MANIFEST, {"version": MANIFEST_VERSION, **said})

    def open(self) -> Checkpoint | None:
        """The checkpoint; None: not even its description is here, or what is left of it."""
        try:
            said, _, _ = (json.loads((self.directory / file).read_bytes()) for file in (MANIFEST, INDEX, "config.json"))
            return Checkpoint(str(said["name"]), self.directory)
        except (OSError, ValueError, TypeError, LookupError):
            return None


class PartialSection:
    """The file that a section is assembled in. Made by `PartialCheckpoint.begin`."""

    def __init__(self, path: Path, section: int, content: Section, voucher: Voucher) -> None:
        self.content = content
        self._path = path
        self._section = section
        self._voucher = voucher
        self._header = b"" if section == FILES else _safetensors_header(content)
        self._size = len(self._header) + content.nbytes
        self._fresh = not self._taken_up()
        if self._fresh:
            need, free = self._size + SPARE_BYTES, shutil.disk_usage(path.parent).free
            if need > free:
                raise CheckpointError(f"{need >> 20:,} MiB are needed in {path.parent}, {free >> 20:,} MiB are free")
            with path.open("wb") as file:
                file.write(self._header)
                file.truncate(self._size)

    def _taken_up(self) -> bool:
        """Whether an earlier attempt at the very same section is there."""
        try:
            with self._path.open("rb") as file:
                return os.fstat(file.fileno()).st_size == self._size and file.read(len(self._header)) == self._header
        except FileNotFoundError:
            return False

    def missing(self) -> list[Piece]:
        """The pieces that are not here, or not as they should be."""
        pieces, offset = [], len(self._header)
        with self._path.open("rb", buffering=0) as file:
            for item in self.content.items:
                for index, sha256 in enumerate(item.pieces):
                    piece = Piece(self._section, offset, item.piece_bytes(index), sha256)
                    offset += piece.nbytes
                    if self._fresh or not _is_right(file, piece):
                        pieces.append(piece)
        return pieces

    def write(self, piece: Piece, data: bytes | bytearray) -> bool:
        """Put a piece into its place if it is what it should be; else nothing is written.

        Raises: CheckpointError: the disk is full.
        """
        if len(data) != piece.nbytes or hashlib.sha256(data).digest() != piece.sha256:
            return False
        try:
            with self._path.open("r+b", buffering=0) as file:
                file.seek(piece.offset)
                file.write(data)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self._path}: {error.strerror or error}") from error
        return True

    def finish(self) -> None:
        """All pieces are here: give the section its name.

        Raises: DocumentError: the pieces are what the senders promised, but not what the digest vouches for; they are
            thrown away.
        """
        try:
            if self._section == FILES:
                self._spread()
            else:
                self._check_samples()
        except DocumentError:
            self._path.unlink()
            raise
        if self._section == FILES:
            self._path.unlink()
        else:
            os.replace(self._path, self._path.with_suffix(""))

    def _spread(self) -> None:
        """Make files of the section."""
        parts: dict[str, bytes] = {}
        with self._path.open("rb") as file:
            for item in self.content.items:
                parts[item.name] = file.read(item.nbytes)
        try:
            config = json.loads(parts["config.json"])
        except (ValueError, RecursionError):
            raise DocumentError("a configuration that is none") from None
        if not isinstance(config, dict):
            raise DocumentError("a configuration that is none")
        self._voucher.check_config(config)
        for name, content in parts.items():
            (self._path.parent / name).write_bytes(content)

    def _check_samples(self) -> None:
        block = self._section - FIRST_BLOCK
        if self._voucher.samples is None or block < 0:
            return
        blocks = find_blocks([item.name for item in self.content.items], range(block, block + 1))
        rests = dict(blocks[0]) if blocks else {}
        offset = len(self._header)
        with self._path.open("rb", buffering=0) as file:
            for item in self.content.items:
                entry = TensorEntry(item.name, item.dtype, item.shape, offset, item.nbytes)
                offset += item.nbytes
                rest = rests.get(item.name, "")
                if sample_hash(file, entry, (block, rest)) != self._voucher.samples.get(block, {}).get(rest):
                    raise DocumentError(f"{item.name} is not the tensor that the digest was made of")


def _is_right(file: Any, piece: Piece) -> bool:
    file.seek(piece.offset)
    return hashlib.sha256(file.read(piece.nbytes)).digest() == piece.sha256


def _shard(section: int) -> str:
    return "others.safetensors" if section == OTHERS else f"block-{section - FIRST_BLOCK:05d}.safetensors"


def _safetensors_header(content: Section) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for item in content.items:
        entries[item.name] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [begin, begin + item.nbytes],
        }
        begin += item.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header
