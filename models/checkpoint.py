"""A checkpoint on disk: its configuration, its tensors by name, and who it is.

Identity. Peers must agree that they hold the same weights, and a client must know it without having any block weights.
`Checkpoint.digest` is SHA-256 over

- the configuration as canonical JSON, without what changes when nothing does (file names, library version, dtype), and
- for a snapshot of the Hugging Face hub: repository and commit, which name the weights exactly;
- for a local directory: every tensor's name, dtype and shape, and three 4-KiB samples of its bytes (start, middle,
  end). Any ordinary change of weights - training, merging, another conversion - changes every sample. The result is
  kept in `petals.json` beside the weights (in the user's cache where that can not be written), with the sizes of the
  files it was made from, so that a client whose block shards were never copied or were deleted still knows it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from petals.models.errors import ModelError

Progress = Callable[[str], None]
"""Takes one line for people."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "petals.json"
_SAMPLE_BYTES = 4096
_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "_commit_hash")
_HEADER_LIMIT = 100 << 20
"""A safetensors header; the format's own limit is 100 MB."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. Opening it reads no weights."""

    name: str
    directory: Path
    config: PretrainedConfig = field(repr=False)
    files: dict[str, str] = field(repr=False)
    """Tensor name -> file name; files may be missing where only a part of the model is here."""
    hub_commit: str | None = None

    @property
    def num_blocks(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype most of the weights are stored in."""
        declared = getattr(self.config, "dtype", None)
        return declared if isinstance(declared, torch.dtype) else torch.float32

    @cached_property
    def digest(self) -> str:
        """64 hex digits; what "the same model" means in the swarm (module docstring)."""
        whole = hashlib.sha256(_canonical_config(self.config))
        if self.hub_commit is not None:
            whole.update(f"hub {self.name} {self.hub_commit}".encode())
        else:
            whole.update(self._weights_identity().encode())
        return whole.hexdigest()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors and nothing else, memory-mapped from their files.

        Raises:
            ModelError: a tensor's file is not here, or is damaged.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(self._present(file), framework="pt") as shard:
                    for name in wanted:
                        tensors[name] = shard.get_tensor(name)
            except SafetensorError as error:
                raise ModelError(f"{self.directory / file} is damaged ({error}); fetch it again") from None
        return tensors

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer.

        Raises:
            ModelError: the checkpoint has none.
        """
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(self.directory))
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{self.directory} has no tokenizer that can be read: {_first_line(error)}") from None
        return tokenizer

    def _present(self, file: str) -> Path:
        path = self.directory / file
        if not path.exists():
            if self.hub_commit is None:
                raise ModelError(f"{path} is missing: this directory does not hold the weights that were asked for")
            from petals.models.hub import fetch_file

            return fetch_file(self.name, file, self.hub_commit)
        return path

    def _weights_identity(self) -> str:
        sizes = {
            file: (self.directory / file).stat().st_size
            for file in sorted(set(self.files.values()))
            if (self.directory / file).exists()
        }
        manifests = [self.directory / MANIFEST, _cached_manifest(self.directory)]
        for manifest in manifests:
            known = _read_manifest(manifest)
            if known is not None and all(known["files"].get(file) == size for file, size in sizes.items()):
                return str(known["weights"])
        absent = sorted(set(self.files.values()) - set(sizes))
        if absent:
            raise ModelError(
                f"{self.directory} lacks {absent[0]} and has no {MANIFEST} that names the whole model; "
                f"copy {MANIFEST} from a peer that holds all of it"
            )
        identity = _sample_weights(self.directory, sorted(sizes))
        content = json.dumps({"weights": identity, "files": sizes}, indent=1)
        for manifest in manifests:
            try:
                manifest.parent.mkdir(parents=True, exist_ok=True)
                temporary = manifest.with_suffix(f".{os.getpid()}")
                temporary.write_text(content)
                temporary.replace(manifest)
                break
            except OSError:
                continue  # a read-only model directory: the user's cache is next
        return identity


def open_checkpoint(
    model: str | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open a model by what the user called it.

    Args:
        model: a local directory, a `.gguf` file, a hub name ("org/name"), or None: the default model.
        revision, token: for the hub.
        progress: told in one line what is fetched or converted, when it takes time.
    Raises:
        ModelError: one line saying what is wrong and what to do.
    """
    from petals.models import hub

    say = progress or (lambda line: None)
    if model is None:
        return open_directory(hub.default_model(say), name=hub.DEFAULT_MODEL)
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return open_directory(hub.convert_gguf(path, say), name=path.stem)
    if path.is_dir():
        return open_directory(path)
    if model == hub.DEFAULT_MODEL and revision is None:
        return open_directory(hub.default_model(say), name=hub.DEFAULT_MODEL)
    if model.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ModelError(f"no model at {model!r}: give a directory, a .gguf file or a hub name like org/name")
    directory, commit = hub.fetch_metadata(model, revision, token, say)
    return open_directory(directory, name=model, hub_commit=commit)


def open_directory(path: Path, *, name: str | None = None, hub_commit: str | None = None) -> Checkpoint:
    """Open a directory with config.json and safetensors weights, single or sharded."""
    path = path.resolve()
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: it is not a model directory in the transformers format")
    try:
        config = AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path / 'config.json'} can not be used: {_first_line(error)}") from None
    text = config.get_text_config()
    return Checkpoint(name or path.name, path, text, _tensor_files(path), hub_commit)


def cache_directory() -> Path:
    """Where converted models and downloads are kept: $PETALS_CACHE, else the user's cache directory."""
    if configured := os.environ.get("PETALS_CACHE"):
        return Path(configured)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "petals"


def _tensor_files(path: Path) -> dict[str, str]:
    index = path / INDEX
    if index.is_file():
        try:
            files = json.loads(index.read_text())["weight_map"]
            if all(isinstance(file, str) and Path(file).name == file for file in files.values()):
                return dict(files)
        except (ValueError, KeyError, AttributeError):
            pass
        raise ModelError(f"{index} is not a safetensors index; fetch it again")
    if (path / SINGLE).is_file():
        return dict.fromkeys(_tensor_names(path / SINGLE), SINGLE)
    if list(path.glob("*.bin")):
        raise ModelError(
            f"{path} holds pickled weights (.bin), which are never opened; convert them once with "
            "transformers' save_pretrained(..., safe_serialization=True)"
        )
    raise ModelError(f"{path} has neither {SINGLE} nor {INDEX}")


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as shard:
            return list(shard.keys())
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged ({error}); fetch it again") from None


def _canonical_config(config: PretrainedConfig) -> bytes:
    fields: dict[str, Any] = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
    return json.dumps(fields, sort_keys=True, default=str).encode()


def _sample_weights(directory: Path, files: list[str]) -> str:
    """Digest over names, dtypes, shapes and samples of all tensors; reads about 12 KiB per tensor."""
    lines: list[str] = []
    for file in files:
        with (directory / file).open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            if header_size > _HEADER_LIMIT:
                raise ModelError(f"{directory / file} is no safetensors file; fetch it again")
            header = json.loads(stream.read(header_size))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                sample = hashlib.sha256()
                for offset in (start, (start + end - _SAMPLE_BYTES) // 2, end - _SAMPLE_BYTES):
                    stream.seek(8 + header_size + max(start, offset))
                    sample.update(stream.read(min(_SAMPLE_BYTES, end - start)))
                lines.append(f"{name} {entry['dtype']} {entry['shape']} {sample.hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _cached_manifest(directory: Path) -> Path:
    return cache_directory() / "manifests" / f"{hashlib.sha256(str(directory).encode()).hexdigest()[:32]}.json"


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return None
    return manifest if isinstance(manifest.get("weights"), str) else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
