"""A checkpoint as strangers pass it on: sections of items, items in pieces, every piece known by its SHA-256.

    document 0          the preimage of the model's digest (checkpoint.py); says what the digest vouches for
    document 1          the index: the names of all tensors, and the licence
    section 2           the small files: configuration, tokenizer, chat template, model card, licence
    section 3           the tensors that belong to no block: embeddings, final norm, head
    section 4 + b       the tensors of block b

A section is a document, too: it lists its items in order of name: tensor or file, dtype, shape, size, and the SHA-256
of each MiB. It does not depend on how the sender's tensors are dealt to shards, so honest senders of one model say the
same to the byte. Documents are JSON, and everything in one that a stranger sent is checked here before anybody
believes it.

How much the digest vouches for depends on what it is made of. Of a *sealed* model it is the hash of all sections'
hashes: every byte follows from it. Of a local directory: the configuration, and names,
dtypes, shapes and four samples of every block tensor. Of a hub model or converted GGUF file: only its name. For the
rest the senders' word counts (peer/weights/fetch.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from petals.models.errors import CheckpointError, DocumentError
from petals.models.source.checkpoint import (
    Checkpoint,
    stable_config,
    write_identity,
)
from petals.models.source.shard import DTYPE_BYTES

PIECE_BYTES = 1 << 20
PREIMAGE, INDEX, FILES, OTHERS, FIRST_BLOCK = range(5)
MAX_FILE_BYTES = 64 << 20
"""One of the small files; the largest tokenizers have 30 MB."""
MAX_ITEMS = 1 << 17
MAX_VALUES = 1 << 20
"""In one document: names, sizes, lists. The index of a model of 1,000 billion parameters has 600,000."""
MAX_NAME = 512
MAX_DIMENSIONS = 8
MAX_ITEM_BYTES = 1 << 44

SHARED_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "chat_template.json",
        "README.md",
        "LICENSE",
        "LICENSE.txt",
        "LICENSE.md",
        "NOTICE",
    }
)
"""No other name ever becomes a file, whoever asks or answers. No code among them."""


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor, or a small file."""

    name: str
    dtype: str
    """As safetensors has it ("BF16"); empty: a file."""
    shape: tuple[int, ...]
    nbytes: int
    pieces: tuple[bytes, ...]
    """SHA-256 of each MiB; the last may be shorter."""

    def piece_bytes(self, index: int) -> int:
        return min(PIECE_BYTES, self.nbytes - index * PIECE_BYTES)


@dataclass(frozen=True, slots=True)
class Section:
    """Items in order of name."""

    items: tuple[Item, ...]

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)


def section_of(block: int) -> int:
    return FIRST_BLOCK + block


def encode_section(section: Section) -> bytes:
    """The document: the same bytes from everybody who has the same content."""
    return _encode(
        [[item.name, item.dtype, list(item.shape), item.nbytes, b"".join(item.pieces).hex()] for item in section.items]
    )


def decode_section(index: int, data: bytes) -> Section:
    """A section from a stranger.

    Raises: DocumentError: not a list of items as this section may have them, or their sizes do not add up.
    """
    listed = _decode(data)
    _check(isinstance(listed, list) and 0 < len(listed) <= MAX_ITEMS, "no list of items")
    items = tuple(_item(entry, is_file=index == FILES) for entry in listed)
    names = [item.name for item in items]
    _check(all(first < second for first, second in pairwise(names)), "items out of order")
    return Section(items)


def _item(entry: Any, *, is_file: bool) -> Item:
    _check(isinstance(entry, list) and len(entry) == 5, "an item of other than five entries")
    name, dtype, shape, nbytes, hashes = entry
    _check(_is_name(name), "a name that is none")
    _check(type(nbytes) is int and 0 <= nbytes <= MAX_ITEM_BYTES, "a size that is none")
    _check(isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS, "a shape that is none")
    _check(all(type(size) is int and 0 <= size <= MAX_ITEM_BYTES for size in shape), "a shape that is none")
    if is_file:
        _check(name in SHARED_FILES, "a file of another name than models have")
        _check(dtype == "" and not shape and nbytes <= MAX_FILE_BYTES, "a file that is too large, or none")
    else:
        _check(isinstance(dtype, str) and dtype in DTYPE_BYTES, "a dtype that is not supported")
        _check(math.prod(shape) * DTYPE_BYTES[dtype] == nbytes, "a shape that does not fit the size")
    _check(isinstance(hashes, str), "hashes that are none")
    _check(len(hashes) == 64 * -(-nbytes // PIECE_BYTES), "another number of hashes than of pieces")
    _check(re.fullmatch("[0-9a-f]*", hashes) is not None, "hashes that are none")
    whole = bytes.fromhex(hashes)
    pieces = tuple(whole[start : start + 32] for start in range(0, len(whole), 32))
    return Item(name, dtype, tuple(shape), nbytes, pieces)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() and name != "__metadata__"


@dataclass(frozen=True, slots=True)
class Index:
    """The names of all tensors, in order, and what the sender takes for the licence."""

    names: tuple[str, ...]
    licence: str


def encode_index(index: Index) -> bytes:
    return _encode({"licence": index.licence, "names": sorted(index.names)})


def decode_index(data: bytes) -> Index:
    """An index from a stranger. Raises DocumentError."""
    found = _decode(data)
    _check(isinstance(found, dict), "no index")
    names, licence = found.get("names"), found.get("licence")
    _check(isinstance(names, list) and 0 < len(names) <= MAX_ITEMS * 8, "no list of names")
    _check(all(map(_is_name, names)), "a name that is none")
    _check(isinstance(licence, str) and len(licence) <= 100 and licence.isprintable(), "no licence")
    return Index(tuple(sorted(set(names))), licence)


@dataclass(frozen=True, slots=True)
class Voucher:
    """What a digest vouches for."""

    text: str
    """The preimage."""
    sections: tuple[bytes, ...] | None = None
    """Of a sealed model, the SHA-256 of every section's document, the files' first."""
    config: Mapping[str, Any] | None = None
    """Of a local directory, its configuration (`stable_config`)."""
    samples: Mapping[int, Mapping[str, str]] | None = None
    """Of a local directory, by block and by name within the block: `checkpoint.sample_hash`."""

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raises DocumentError: not the configuration that the digest is made of."""
        _check(self.config is None or stable_config(config) == self.config, "another configuration than the digest's")

    def check_section(self, index: int, data: bytes) -> None:
        """Raises DocumentError: a sealed model's section is another one."""
        if self.sections is not None:
            _check(
                0 <= index - FILES < len(self.sections)
                and hashlib.sha256(data).digest() == self.sections[index - FILES],
                "not what the model was sealed with",
            )

    def check_names(self, block: int, rests: Iterable[str]) -> None:
        """Raises DocumentError: a block of other tensors than the digest's."""
        if self.samples is not None:
            _check(
                self.samples.get(block, {}).keys() == set(rests), f"other tensors in block {block} than the digest's"
            )


def open_preimage(digest: str, data: bytes) -> Voucher:
    """What `digest` vouches for, from its preimage. Raises DocumentError: it is not the preimage."""
    _check(hashlib.sha256(data).hexdigest() == digest, "not what the digest was made of")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise DocumentError("a preimage that is no text") from None
    if not text.startswith("{"):
        return Voucher(text)
    content = _decode(data)
    if "sections" in content:
        listed = content["sections"]
        _check(isinstance(listed, list), "a seal that is none")
        _check(
            all(isinstance(each, str) and re.fullmatch("[0-9a-f]{64}", each) for each in listed), "a seal of no hashes"
        )
        return Voucher(text, sections=tuple(bytes.fromhex(each) for each in listed))
    samples: dict[int, dict[str, str]] = {}
    try:
        for block, rest, sampled in content["weights"]:
            samples.setdefault(block, {})[rest] = sampled
        config = dict(content["config"])
    except (TypeError, ValueError, KeyError):
        raise DocumentError("a preimage that is none") from None
    return Voucher(text, config=config, samples=samples)


def section_names(checkpoint: Checkpoint, section: int) -> list[str]:
    """The tensors of a section, OTHERS or a block's, in order."""
    if section == OTHERS:
        return sorted(checkpoint.other_tensor_names())
    return sorted(name for name, _ in checkpoint.block_tensors(section - FIRST_BLOCK))


class SharedWeights:
    """What one open checkpoint has to give. Methods read files and hash: call them in a thread."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.num_documents = FIRST_BLOCK + checkpoint.num_blocks
        self._sections: dict[int, bytes] = {}
        self._places: dict[int, dict[bytes, tuple[Path, int, int]]] = {}
        self._lock = threading.Lock()

    @cached_property
    def index(self) -> bytes:
        return encode_index(Index(self.checkpoint.tensor_names(), self.checkpoint.licence))

    def holds(self, section: int) -> bool:
        """Whether there is such a document, and everything of the section lies on this disk."""
        if section < OTHERS:
            return section >= PREIMAGE
        return section < self.num_documents and self.checkpoint.has(section_names(self.checkpoint, section))

    def document(self, section: int) -> bytes:
        """A document that is held; the first time a section's bytes are read and hashed.

        Raises: CheckpointError for files that are damaged.
        """
        if section < FILES:
            return self.index if section == INDEX else self.checkpoint.preimage
        with self._lock:
            if section not in self._sections:
                places: dict[bytes, tuple[Path, int, int]] = {}
                items = tuple(_measure(*source, places) for source in self._sources(section))
                self._places[section] = places
                self._sections[section] = encode_section(Section(items))
            return self._sections[section]

    def piece(self, section: int, sha256: bytes) -> bytes | None:
        """A piece of a section that is held; None: there is no such piece in it.

        Raises: CheckpointError: the file has changed since, or can not be read.
        """
        if section not in self._places:
            self.document(section)
        place = self._places.get(section, {}).get(sha256)
        if place is None:
            return None
        path, offset, nbytes = place
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(nbytes)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        if hashlib.sha256(data).digest() != sha256:
            raise CheckpointError(f"{path} has changed since it was shared first, or the disk is failing")
        return data

    def _sources(self, section: int) -> Iterator[tuple[str, str, tuple[int, ...], Path, int, int]]:
        """(name, dtype, shape, file, offset, size) of every item, in order of name."""
        if section == FILES:
            for name in sorted(SHARED_FILES):
                path = self.checkpoint.directory / name
                if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
                    yield name, "", (), path, 0, path.stat().st_size
            return
        for name in section_names(self.checkpoint, section):
            path, entry = self.checkpoint.locate(name)
            yield name, entry.dtype, entry.shape, path, entry.offset, entry.nbytes


def _measure(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    path: Path,
    offset: int,
    nbytes: int,
    places: dict[bytes, tuple[Path, int, int]],
) -> Item:
    pieces = []
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            for start in range(0, nbytes, PIECE_BYTES):
                data = file.read(min(PIECE_BYTES, nbytes - start))
                pieces.append(hashlib.sha256(data).digest())
                places[pieces[-1]] = (path, offset + start, len(data))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return Item(name, dtype, shape, nbytes, tuple(pieces))


def seal(checkpoint: Checkpoint) -> str:
    """Write into a local directory that its digest is made of all its bytes, and return that digest.

    Everything is read and hashed once; from then on the directory is believed to be what was sealed.

    Raises: CheckpointError when a part is missing, OSError where it can not be written.
    """
    shared = SharedWeights(checkpoint)
    sections = range(FILES, shared.num_documents)
    if not all(map(shared.holds, sections)):
        raise CheckpointError(f"{checkpoint.name} is not here in full, and only the whole can be sealed")
    hashes = [hashlib.sha256(shared.document(section)).hexdigest() for section in sections]
    sealed = _encode({"sections": hashes}).decode()
    write_identity(checkpoint.directory, sealed, checkpoint.licence or None)
    return hashlib.sha256(sealed.encode()).hexdigest()


def _encode(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _decode(data: bytes) -> Any:
    """What a stranger's JSON says. Its values are counted before they are made: 16 MiB of "[]," are 600 MiB of lists.

    Raises: DocumentError.
    """
    if sum(data.count(sign) for sign in (b",", b"[", b"{", b":")) > MAX_VALUES:
        raise DocumentError(f"a document of more than {MAX_VALUES} values")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise DocumentError("a document that is no JSON") from None


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise DocumentError(otherwise)
