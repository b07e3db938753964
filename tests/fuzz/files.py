"""What a file from somewhere can hold: keys, checkpoints, adapters, hashes of API keys."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from safetensors.torch import save
from transformers import GenerationConfig

from petals.gateway.keys import hash_key, hash_of, load_keys
from petals.models.blocks.adapters import CONFIG, WEIGHTS, load_lora
from petals.models.client.decoding import processors_of
from petals.models.client.generation_settings import read_settings
from petals.models.errors import ModelError
from petals.models.source import checkpoint as checkpoint_module
from petals.models.source.checkpoint import INDEX, MANIFEST, SINGLE, open_checkpoint
from petals.models.source.gguf_header import check_gguf
from petals.peer.base.identity import IdentityError, create_identity, load_identity, verify
from petals.protocols.errors import UserError
from petals.protocols.types import PeerId
from tests.fuzz.sessions import span
from tests.models.tiny import CASES, HIDDEN, VOCABULARY, save_tiny

MAX_READ = 1 << 20


@cache
def room() -> Path:
    """A directory in memory where there is one: every input becomes a file."""
    shared = Path("/dev/shm")
    room = tempfile.mkdtemp(prefix="petals-fuzz-", dir=shared if os.access(shared, os.W_OK) else None)
    atexit.register(shutil.rmtree, room, ignore_errors=True)
    return Path(room)


def _file(name: str, data: bytes) -> Path:
    path = room() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def generation_settings(data: bytes) -> None:
    """A `generation_config.json`: whatever it holds, a generation can follow what is left of it."""
    _file("settings/generation_config.json", data)
    default = GenerationConfig()
    config, left_out = read_settings(room() / "settings", default, VOCABULARY)
    assert all(len(line) < 1000 and line.isprintable() for line in left_out)
    for samples in (False, True):
        config.do_sample = samples
        processors = processors_of(config, prompt_length=3, max_length=8, ends=[])
        for length in (3, 5, 7):
            text = torch.arange(length)[None]
            assert processors(text, torch.zeros(1, VOCABULARY)).shape == (1, VOCABULARY)


def generation_settings_seeds() -> list[bytes]:
    """What people have, and one of everything."""
    usual = {"bos_token_id": 1, "eos_token_id": [2, 5], "temperature": 0.7, "top_p": 0.9, "do_sample": True}
    rules = {
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[9], [4, 5]], "suppress_tokens": [11],
        "begin_suppress_tokens": [20], "sequence_bias": [[[5], 2.0]], "min_new_tokens": 4, "forced_eos_token_id": 7,
        "exponential_decay_length_penalty": [3, 1.5], "stop_strings": ["the"], "max_time": 5.0, "top_k": 20,
    }  # fmt: skip
    odd = {"num_beams": 4, "penalty_alpha": 0.6, "use_cache": False, "cache_implementation": "static", "min_p": 0.01}
    return [json.dumps(each).encode() for each in (usual, rules, odd, usual | rules | odd)]


def keys(data: bytes) -> None:
    """A key file; a public key and a signature of a stranger."""
    with suppress(IdentityError):
        assert load_identity(_file("some.key", data)).peer_id
    assert not verify(PeerId("12D3KooWNobody"), data, b"data", data)


def keys_seeds() -> list[bytes]:
    """One of each type, private and public. Made for this and used nowhere."""
    pairs = [create_identity(key_type=kind).key_pair for kind in ("ed25519", "rsa")]
    return [half.serialize() for pair in pairs for half in (pair.private_key, pair.public_key)]


def api_keys(data: bytes) -> None:
    """The file of hashes, and a header of a stranger."""
    with suppress(UserError):
        load_keys(_file("api_keys", data))
    assert hash_of(data.decode("latin-1")) != hash_key("petals-something")


def api_keys_seeds() -> list[bytes]:
    """Two hashes, a comment; a header."""
    return [f"# keys\n{hash_key('petals-a')} Ann\n\n{hash_key('petals-b')}\n".encode(), b"Bearer petals-abc"]


# -- checkpoints ------------------------------------------------------------------------------------------------------


@cache
def _checkpoint() -> Path:
    directory = room() / "model"
    save_tiny(next(case for case in CASES if case.id == "llama"), directory)
    for path in directory.iterdir():  # the manifest names times, and is believed only if they are right
        os.utime(path, ns=(10**18, 10**18))
    return directory


def _look_at_everything(directory: Path) -> None:
    with suppress(ModelError):
        checkpoint = open_checkpoint(directory)
        checkpoint.dtype  # noqa: B018
        with suppress(ModelError):
            checkpoint.digest  # noqa: B018
        for block in range(min(checkpoint.num_blocks, 4)):
            with suppress(ModelError):
                checkpoint.read([name for name, _ in checkpoint.block_tensors(block)], dtype=torch.float32)
        with suppress(ModelError):
            checkpoint.other_tensor_names()


@cache
def _config_of(directory: Path) -> Any:
    """Read once: the library takes longer for it than everything else does."""
    return checkpoint_module._load_config("fuzzed", directory)


@contextmanager
def _known_config(directory: Path) -> Iterator[None]:
    """For decoders of other files than config.json."""
    known, load = _config_of(directory), checkpoint_module._load_config
    checkpoint_module._load_config = lambda name, directory: known
    try:
        yield
    finally:
        checkpoint_module._load_config = load


def _with(file: str, data: bytes) -> None:
    """The tiny checkpoint with one file changed."""
    path = _checkpoint() / file
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    try:
        _look_at_everything(_checkpoint())
    finally:
        (_checkpoint() / MANIFEST).unlink(missing_ok=True)
        if before is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(before)


def config(data: bytes) -> None:
    """config.json."""
    _with("config.json", data)


def config_seeds() -> list[bytes]:
    """The tiny model's; one that wants its own code run."""
    plain = (_checkpoint() / "config.json").read_bytes()
    return [
        plain,
        json.dumps(json.loads(plain) | {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "x"}).encode(),
    ]


def index(data: bytes) -> None:
    """The index of shards."""
    with _known_config(_checkpoint()):
        _with(INDEX, data)


def index_seeds() -> list[bytes]:
    """The tiny model's."""
    return [(_checkpoint() / INDEX).read_bytes()]


def manifest(data: bytes) -> None:
    """petals.json, our own note of what a directory holds."""
    with _known_config(_checkpoint()):
        _with(MANIFEST, data)


def manifest_seeds() -> list[bytes]:
    """As it is written, and as a conversion writes it."""
    open_checkpoint(_checkpoint()).digest  # noqa: B018
    written = (_checkpoint() / MANIFEST).read_bytes()
    (_checkpoint() / MANIFEST).unlink()
    return [written, b'{"version": 1, "identity": "gguf:00:v1"}']


def safetensors(data: bytes) -> None:
    """A file of weights: its header and whatever it says is behind."""
    directory = room() / "single"
    if not directory.exists():
        directory.mkdir()
        (directory / "config.json").write_bytes((_checkpoint() / "config.json").read_bytes())
    (directory / SINGLE).write_bytes(data)
    with suppress(ModelError), _known_config(directory):
        checkpoint = open_checkpoint(directory)
        for name in checkpoint.tensor_names():
            with suppress(ModelError):
                assert checkpoint.read([name])[name].nbytes <= len(data)
        checkpoint.digest  # noqa: B018
    (directory / MANIFEST).unlink(missing_ok=True)


def safetensors_seeds() -> list[bytes]:
    """Four blocks of one tensor each, in several dtypes."""
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
    tensors = {f"model.layers.{block}.w": torch.ones(2, 3).to(kind) for block, kind in enumerate(kinds)}
    saved = save(tensors, metadata={"format": "pt"})
    header = {f"model.layers.{block}.w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for block in range(4)}
    text = json.dumps(header).encode()
    return [saved, struct.pack("<Q", len(text)) + text + bytes(4)]


def adapter(data: bytes) -> None:
    """A LoRA adapter: the first byte says which of its two files is the fuzzer's."""
    directory = room() / "adapter"
    config, weights = _adapter()
    which = bool(data[:1] and data[0] & 1)
    directory.mkdir(exist_ok=True)
    (directory / CONFIG).write_bytes(config if which else data[1:])
    (directory / WEIGHTS).write_bytes(data[1:] if which else weights)
    with suppress(ModelError):
        load_lora(directory, span())


@cache
def _adapter() -> tuple[bytes, bytes]:
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "alpha_pattern": {"q_proj": 8},
    }
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format(block, "A"): torch.ones(2, HIDDEN) for block in range(2)}
    tensors |= {name.format(block, "B"): torch.ones(HIDDEN, 2) for block in range(2)}
    return json.dumps(config).encode(), save(tensors)


def adapter_seeds() -> list[bytes]:
    """Both files."""
    config, weights = _adapter()
    return [b"\0" + config, b"\1" + weights]


def gguf_file(data: bytes) -> None:
    """A GGUF file: our look at its header, and the library's reader behind it."""
    path = _file("some.gguf", data)
    try:
        check_gguf(path)
    except ModelError:
        return
    reader = gguf.GGUFReader(path)  # what the check lets through it must be able to read
    for field in reader.fields.values():
        with suppress(UnicodeDecodeError):
            field.contents()


def gguf_file_seeds() -> list[bytes]:
    """A Llama of no size with every kind of value."""
    path = room() / "seed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_rope_freq_base(1e4)
    writer.add_bool("general.flag", True)
    writer.add_token_list(["a", "b"])
    writer.add_token_scores([0.5, 1.5])
    writer.add_tensor("token_embd.weight", numpy.ones((2, 32), dtype=numpy.float32))
    writer.add_tensor(
        "blk.0.attn_q.weight", numpy.ones((1, 18), dtype=numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [path.read_bytes()]
