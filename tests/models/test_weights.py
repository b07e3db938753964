"""Documents about a checkpoint: the same from everybody who has it, and nothing believed of what strangers say."""

from __future__ import annotations

import copy as copying
import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from petals.models.errors import CheckpointError, DocumentError
from petals.models.source.checkpoint import MANIFEST, Checkpoint, open_checkpoint
from petals.models.source.licence import find_licence, may_share
from petals.models.source.partial import PartialCheckpoint
from petals.models.source.weights import (
    FILES,
    FIRST_BLOCK,
    INDEX,
    OTHERS,
    PIECE_BYTES,
    PREIMAGE,
    Item,
    Section,
    SharedWeights,
    decode_index,
    decode_section,
    encode_section,
    open_preimage,
    seal,
)
from tests.models.conftest import Tiny


@pytest.fixture
def copy(llama: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama.directory, tmp_path / "copy", ignore=shutil.ignore_patterns(MANIFEST)))


def assemble(shared: SharedWeights, directory: Path) -> Checkpoint:
    """All of a checkpoint, piece by piece, without a network."""
    voucher = open_preimage(shared.checkpoint.digest, shared.document(PREIMAGE))
    partial = PartialCheckpoint(shared.checkpoint.digest, directory)
    for section in range(FILES, shared.num_documents):
        document = shared.document(section)
        voucher.check_section(section, document)
        place = partial.begin(section, decode_section(section, document), voucher)
        for piece in place.missing():
            data = shared.piece(section, piece.sha256)
            assert data is not None
            assert not place.write(piece, data + b"x")
            assert place.write(piece, data)
        assert not partial.begin(section, place.content, voucher).missing()
        place.finish()
        if section == FILES:
            partial.describe("tiny", voucher, decode_index(shared.document(INDEX)))
    found = partial.open()
    assert found is not None
    return found


def test_documents_do_not_depend_on_the_shards(llama: Tiny, tmp_path: Path) -> None:
    llama.reference.model.save_pretrained(tmp_path / "single")
    shared, single = SharedWeights(llama.checkpoint), SharedWeights(open_checkpoint(tmp_path / "single"))
    for document in (PREIMAGE, INDEX, OTHERS, *range(FIRST_BLOCK, FIRST_BLOCK + 4)):
        assert shared.holds(document)
        assert shared.document(document) == single.document(document)
    assert not shared.holds(FIRST_BLOCK + 4)


@pytest.mark.parametrize("sealed", [False, True])
def test_what_is_assembled_is_the_checkpoint_and_can_be_shared_again(copy: Path, tmp_path: Path, sealed: bool) -> None:
    original = seal(open_checkpoint(copy)) if sealed else open_checkpoint(copy).digest
    shared = SharedWeights(open_checkpoint(copy))
    again = SharedWeights(assemble(shared, tmp_path / "fetched"))
    assert again.checkpoint.digest == shared.checkpoint.digest == original
    for document in range(shared.num_documents):
        assert again.document(document) == shared.document(document)


def test_a_seal_is_about_every_byte(copy: Path, tmp_path: Path) -> None:
    unsealed = open_checkpoint(copy).digest
    (copy / MANIFEST).unlink()
    path, entry = open_checkpoint(copy).locate("lm_head.weight")
    before = seal(open_checkpoint(copy))
    with path.open("r+b") as file:
        file.seek(entry.offset + entry.nbytes // 2 + 1)
        file.write(b"!")
    (copy / MANIFEST).unlink()
    assert open_checkpoint(copy).digest == unsealed  # the head is not in the digest of an unsealed directory
    (copy / MANIFEST).unlink()
    assert seal(open_checkpoint(copy)) != before


def test_a_file_that_changes_is_not_passed_on(copy: Path) -> None:
    shared = SharedWeights(open_checkpoint(copy))
    section = decode_section(OTHERS, shared.document(OTHERS))
    path, entry = open_checkpoint(copy).locate(section.items[0].name)
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"!")
    with pytest.raises(CheckpointError, match="has changed since"):
        shared.piece(OTHERS, section.items[0].pieces[0])


def test_a_full_disk_is_named_before_anything_is_written(llama: Tiny, tmp_path: Path) -> None:
    shared = SharedWeights(llama.checkpoint)
    voucher = open_preimage(shared.checkpoint.digest, shared.document(PREIMAGE))
    pieces = (bytes(32),) * (1 << 10)
    huge = Section((Item("w", "U8", (1 << 50,), 1 << 50, pieces),))
    with pytest.raises(CheckpointError, match="MiB are needed in"):
        PartialCheckpoint(shared.checkpoint.digest, tmp_path).begin(OTHERS, huge, voucher)
    assert not list(tmp_path.iterdir())


ITEM = ["model.layers.0.w", "F32", [2, 3], 24, "ab" * 32]
LIES: list[Any] = [
    {},
    [],
    [[]],
    [ITEM, ITEM],
    [["z", *ITEM[1:]], ITEM],
    [["", *ITEM[1:]]],
    [["__metadata__", *ITEM[1:]]],
    [["a\nb", *ITEM[1:]]],
    [["x" * 513, *ITEM[1:]]],
    [[ITEM[0], "F3", *ITEM[2:]]],
    [[ITEM[0], "", *ITEM[2:]]],
    [[*ITEM[:2], [2, 4], *ITEM[3:]]],
    [[*ITEM[:2], [-2, -3], *ITEM[3:]]],
    [[*ITEM[:2], [2, 3, True], *ITEM[3:]]],
    [[*ITEM[:2], [1 << 45], 1 << 47, ITEM[4]]],
    [[*ITEM[:3], 24.0, ITEM[4]]],
    [[*ITEM[:4], "ab" * 31]],
    [[*ITEM[:4], "zz" * 32]],
    [[*ITEM[:4], "ab" * 64]],
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: json.dumps(lie)[:60])
def test_sections_that_are_none(lie: Any) -> None:
    assert decode_section(OTHERS, json.dumps([ITEM]).encode()).nbytes == 24
    with pytest.raises(DocumentError):
        decode_section(OTHERS, json.dumps(lie).encode())


@pytest.mark.parametrize(
    "name", ["../config.json", "/etc/passwd", "modeling_evil.py", "config.json/x", "petals.json", "model.safetensors"]
)
def test_only_names_from_the_table_become_files(name: str) -> None:
    assert decode_section(FILES, json.dumps([["config.json", "", [], 2, "ab" * 32]]).encode()).items
    with pytest.raises(DocumentError, match="another name"):
        decode_section(FILES, json.dumps([[name, "", [], 2, "ab" * 32]]).encode())


@example(b"[" * 200_000)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_bytes_that_are_no_document(data: bytes) -> None:
    for decode in (lambda: decode_section(OTHERS, data), lambda: decode_index(data)):
        with pytest.raises(DocumentError):
            decode()
    with pytest.raises(DocumentError):
        open_preimage("ab" * 32, data)


@given(st.data())
def test_preimages_of_a_stranger_who_chose_the_digest(data: st.DataObject) -> None:
    """Whatever is in one, it is read or refused with the one error that blames the sender."""
    scalars = st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=3)
    keys = st.sampled_from(["sections", "weights", "config"])
    content = data.draw(st.dictionaries(keys, scalars | st.lists(scalars, max_size=3), max_size=3))
    said = json.dumps(content).encode()
    with suppress(DocumentError):
        open_preimage(hashlib.sha256(said).hexdigest(), said).check_names(0, ["w"])


@given(
    sizes=st.lists(
        st.integers(0, 3 * PIECE_BYTES) | st.sampled_from([PIECE_BYTES, PIECE_BYTES + 1]), min_size=1, max_size=5
    )
)
def test_pieces_add_up_to_their_item(sizes: list[int]) -> None:
    items = []
    for index, size in enumerate(sizes):
        count = -(-size // PIECE_BYTES)
        items.append(Item(f"w{index}", "U8", (size,), size, tuple(bytes([k] * 32) for k in range(count))))
    section = decode_section(OTHERS, encode_section(Section(tuple(items))))
    assert section.items == tuple(items)
    for item in section.items:
        assert sum(item.piece_bytes(k) for k in range(len(item.pieces))) == item.nbytes


def test_the_digest_vouches_for_configuration_and_names(copy: Path, tmp_path: Path) -> None:
    shared = SharedWeights(open_checkpoint(copy))
    voucher = open_preimage(shared.checkpoint.digest, shared.document(PREIMAGE))
    config = json.loads((copy / "config.json").read_text())
    voucher.check_config(config | {"transformers_version": "9"})
    with pytest.raises(DocumentError):
        voucher.check_config(config | {"rms_norm_eps": 1e-3})
    names = list(decode_index(shared.document(INDEX)).names)
    assemble(shared, tmp_path / "fetched")
    others = copying.copy(names)
    others.remove("model.layers.1.mlp.up_proj.weight")
    for wrong in (others, [name.replace("layers.3", "layers.5") for name in names]):
        index = decode_index(json.dumps({"licence": "", "names": wrong}).encode())
        with pytest.raises(DocumentError):
            PartialCheckpoint(shared.checkpoint.digest, tmp_path / "fetched").describe("tiny", voucher, index)


@pytest.mark.parametrize(
    ("files", "licence", "shared"),
    [
        ({"README.md": "---\ntags: [x]\nlicense: Apache-2.0\n---\n"}, "apache-2.0", True),
        ({"README.md": '---\nlicense: "mit"\n---\n'}, "mit", True),
        ({"README.md": "---\nlicense: llama3.1\n---\n", "LICENSE": "MIT"}, "llama3.1", False),
        ({"README.md": "---\nlicense: gemma\n---\n"}, "gemma", False),
        ({"README.md": "---\nlicense: other\nlicense_name: mine\n---\n"}, "other", False),
        ({"README.md": "---\nlicense: bigscience-bloom-rail-1.0\n---\n"}, "bigscience-bloom-rail-1.0", True),
        ({"README.md": "# license: mit\n"}, "", False),
        ({"LICENSE": "                 Apache License\n           Version 2.0, January 2004\n"}, "apache-2.0", True),
        ({"LICENSE.txt": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"}, "", False),
        ({}, "", False),
    ],
    ids=str,
)
def test_licences(tmp_path: Path, files: dict[str, str], licence: str, shared: bool) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert find_licence(tmp_path) == licence
    assert may_share(licence) is shared


def test_only_a_whole_model_can_be_sealed(copy: Path) -> None:
    checkpoint = open_checkpoint(copy)
    checkpoint.locate("lm_head.weight")[0].unlink()
    with pytest.raises(CheckpointError, match="not here in full"):
        seal(checkpoint)


def test_the_default_model_may_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert may_share(open_checkpoint().licence)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "evil", "auto_map": {"AutoConfig": "somebody/repo--configuration_evil.Evil"}},
        {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 3},
        {"model_type": "llama", "num_hidden_layers": "many"},
        {"model_type": "llama", "num_hidden_layers": -1},
        {"model_type": ["llama"]},
        {},
    ],
    ids=str,
)
def test_a_configuration_that_transformers_does_not_know_is_one_line(tmp_path: Path, config: dict[str, Any]) -> None:
    """Nor is code of a stranger's ever looked for."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with ThreadPoolExecutor(1) as threads, pytest.raises(CheckpointError):  # as a peer opens it
        threads.submit(Checkpoint, "x", tmp_path).result()
