"""A model on disk: its configuration, the names of its tensors, and any few of them.

Only safetensors are read (shard.py), never pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from petals.models.blocks.standin import evaluate, stand_in
from petals.models.errors import BlockRangeError, CheckpointError
from petals.models.progress import Meter
from petals.models.source.disk import cache_directory, write_json
from petals.models.source.formats import Scheme, scheme_of
from petals.models.source.licence import find_licence
from petals.models.source.settings import check_tokenizer, configuration_directory, scratch_directory
from petals.models.source.shard import TensorEntry, parse_header, read_tensor, sample_hash
from petals.models.source.sources import sources_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "petals.json"
MANIFEST_VERSION = 1

_MAX_BLOCKS, _MAX_HIDDEN = 4096, 1 << 20
"""More than any model has; what a configuration claims is a size of lists and tensors before anything proves it."""

_VOLATILE = frozenset({"_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})
"""Entries of config.json that say how a file was written or used, not which model it is."""

_UNKNOWN_CONFIG = (OSError, ValueError, LookupError, TypeError, AttributeError, StrictDataclassError)
"""What the library raises for entries of config.json that it does not expect; a stranger may have written it."""

Progress = Callable[[str], None]
"""Called with one line for people, when something takes time."""

Fetch = Callable[[str], Path]
"""Gives the local path of one file of the checkpoint, downloading it if need be."""


def open_checkpoint(
    model: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open MODEL; no block weights are read.

    Args:
        model: a directory with config.json and safetensors, a .gguf file, a name on the Hugging Face hub, or None for
            the default model, SmolLM2-135M-Instruct.
        revision, token: for the hub only.
        progress: told what is fetched or converted; None: lines on stderr.
    Raises: CheckpointError, one line that says what to do.
    """
    from petals.models.source import hub  # it needs this module

    return hub.open_model(model, revision, token, progress)


class Checkpoint:
    """A model's files. Opened by `open_checkpoint`; the constructor takes a directory as it is.

    Attributes:
        name: the hub's name, or the directory's.
        directory: where config.json lies.
        config: the configuration of the text model.
        num_blocks, hidden_size: as configured.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        identity: str | None = None,
        fetch: Fetch | None = None,
        licence: str | None = None,
    ) -> None:
        """`identity` names the block weights if the source does (a hub commit); `fetch` brings shards when needed.

        Raises: CheckpointError when the directory is no safetensors checkpoint.
        """
        self.name = name
        self.directory = directory
        self._identity = identity
        self._licence = licence
        self._fetch: Fetch = fetch or self._path_of
        self._raw_config = _read_json(directory / "config.json")
        self.config = _load_config(name, directory)
        self.num_blocks: int = self.config.num_hidden_layers
        self.hidden_size: int = self.config.hidden_size
        self._headers: dict[str, dict[str, TensorEntry]] = {}

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, {str(self.directory)!r})"

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        """Tensor name -> file."""
        # As transformers has it: where both are, the single file is the model, and the index is left over.
        if (self.directory / INDEX).exists() and not (self.directory / SINGLE).exists():
            found = _read_json(self.directory / INDEX).get("weight_map")
            if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
                raise CheckpointError(f"{self.name}: {INDEX} has no weight_map of names and files")
            for file in set(found.values()):
                if Path(file).name != file or not file.endswith(".safetensors") or not file.isprintable():
                    raise CheckpointError(
                        f"{self.name}: {INDEX} names {file!r}, which is no safetensors file beside it"
                    )
            return found
        _refuse_others(self.name, self.directory)
        return dict.fromkeys(self._header(SINGLE), SINGLE)

    def tensor_names(self) -> tuple[str, ...]:
        """Names of all tensors, as in the files."""
        return tuple(self._weight_map)

    @cached_property
    def _block_names(self) -> tuple[tuple[tuple[str, str], ...], ...]:
        """For every block, (name, name after the block's index) of its tensors."""
        found = find_blocks(self._weight_map, range(self.num_blocks))
        if found is None:
            raise CheckpointError(
                f"{self.name} has no tensors numbered for {self.num_blocks} blocks; is it a causal LM?"
            )
        return found

    def block_tensors(self, block: int) -> tuple[tuple[str, str], ...]:
        """(name, name within the block) of every tensor of a block: ("model.layers.3.mlp.w", "mlp.w")."""
        if not 0 <= block < self.num_blocks:
            raise BlockRangeError(f"{self.name} has blocks 0:{self.num_blocks}; there is no block {block}")
        return self._block_names[block]

    def other_tensor_names(self) -> tuple[str, ...]:
        """Names of the tensors that belong to no block: embeddings, final norm, head."""
        blocks = {name for block in self._block_names for name, _ in block}
        return tuple(name for name in self._weight_map if name not in blocks)

    @cached_property
    def scheme(self) -> Scheme | None:
        """How the weights are quantised; None: they are not. Raises CheckpointError for a format that is not known."""
        return scheme_of(self.name, self._raw_config)

    def entry(self, name: str) -> TensorEntry:
        """What the header of its shard says about a tensor. Raises: CheckpointError: unknown, or a damaged shard."""
        if name not in self._weight_map:
            raise CheckpointError(f"{self.name} has no tensor {name!r}")
        return self._entry(self._weight_map[name], name)

    def read_stored(self, name: str, index: int | None = None) -> Tensor:
        """One tensor as it is in its file, or `tensor[index]` alone. Raises: CheckpointError, as `read`."""
        entry = self.entry(name)
        with self._open(self._weight_map[name]) as shard:
            return read_tensor(shard, entry if index is None else entry.part(index))

    def read(
        self, names: Iterable[str], *, dtype: torch.dtype | None = None, meter: Meter | None = None
    ) -> dict[str, Tensor]:
        """Read these tensors, and no others, into memory of their own.

        Those that make up a quantised weight come as one, dequantised, under the name of the weight.

        Args:
            dtype: floating tensors are converted to it, one at a time. None: as stored.
            meter: told how many have been read.
        Raises: CheckpointError for unknown names and damaged or missing files.
        """
        tensors: dict[str, Tensor] = {}
        for name, source in sources_of(self, names).items():
            tensor = evaluate(stand_in(source).recipe)
            tensors[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            if meter is not None:
                meter.note(len(tensors))
        return tensors

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the checkpoint says it is stored in, else float32."""
        said = self._raw_config.get("dtype") or self._raw_config.get("torch_dtype")
        if said is None:
            said = getattr(self.config, "dtype", None)
        named = said if isinstance(said, torch.dtype) else getattr(torch, str(said), None)
        return named if isinstance(named, torch.dtype) and named.is_floating_point else torch.float32

    @cached_property
    def digest(self) -> str:
        """64 hex digits that tell this model's blocks from any other's, however they are called: SHA-256 of `preimage`.

        Raises: CheckpointError when a shard is missing and no manifest knows it.
        """
        return hashlib.sha256(self.preimage).hexdigest()

    @cached_property
    def preimage(self) -> bytes:
        """Who the weights are, as far as the source says so; the digest is its SHA-256:

        - hub model: `hub:`, the repository and the commit of the snapshot;
        - model converted from a GGUF file: `gguf:` and that file's SHA-256;
        - sealed directory (models/source/weights.py): the SHA-256 of all its bytes, section by section;
        - other local directory: the configuration and the block weights, as JSON with sorted keys. The configuration is
          config.json without the entries that say how it was written (`_VOLATILE`). The block weights are the list of
          (block, name within the block, SHA-256) of its tensors in order; hashed are block, name, dtype, shape and four
          4-KiB pieces spread evenly from its first to its last byte. It does not depend on how tensors are dealt to
          shards.

        The pieces make it cheap (four disk reads a tensor) and tell apart whatever training touched; an adversary could
        hide a change between them, which a digest that servers state about themselves could not prevent anyway. Whoever
        fetches weights from strangers, and wants every byte to follow from the digest, names a sealed model.

        A client has no block shards to look at. So the hashes of a local directory are written to `petals.json` beside
        the checkpoint (or, when that is not writable, to the user's cache), by shard, with the shard's size: a shard
        that is there is looked at again when its size or time has changed, one that is not is believed.

        Raises: CheckpointError when a shard is missing and no manifest knows it.
        """
        spoken = self._identity or _written(self.directory, "identity")
        if spoken is None:
            content = {"config": stable_config(self._raw_config), "weights": self._sampled_identity()}
            spoken = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return spoken.encode()

    @cached_property
    def licence(self) -> str:
        """An identifier in lower case ("apache-2.0") as the source or the model card has it; empty: nobody says."""
        return (self._licence or _written(self.directory, "licence") or find_licence(self.directory)).lower()

    def has(self, names: Iterable[str]) -> bool:
        """Whether the shards of these tensors are on this disk; nothing is fetched."""
        return all(self._path_of(file).exists() for file in {self._weight_map[name] for name in names})

    def locate(self, name: str) -> tuple[Path, TensorEntry]:
        """The shard of a tensor that `has` knows to be here, and where in it.

        Raises: CheckpointError for a damaged shard.
        """
        file = self._weight_map[name]
        return self._path_of(file), self._entry(file, name)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the checkpoint. Raises CheckpointError when there is none."""
        check_tokenizer(self.name, self.directory)
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # three libraries read what somebody wrote, and raise what they like
            raise CheckpointError(f"{self.name} has no usable tokenizer: {first_line(error)}") from error
        return tokenizer

    def _path_of(self, file: str) -> Path:
        """Where a shard is, or will be."""
        return self.directory / file

    def _header(self, file: str) -> dict[str, TensorEntry]:
        if file not in self._headers:
            with self._open(file) as shard:
                self._headers[file] = parse_header(shard, f"{self.name}: {file}")
        return self._headers[file]

    def _entry(self, file: str, name: str) -> TensorEntry:
        try:
            return self._header(file)[name]
        except KeyError:
            raise CheckpointError(f"{self.name}: {file} lacks {name!r}, which {INDEX} says it holds") from None

    def _open(self, file: str) -> Any:
        try:
            return open(self._fetch(file), "rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{self.name}: cannot read {file}: {error.strerror or error}") from error

    def _sampled_identity(self) -> list[list[Any]]:
        manifests = _manifest_paths(self.directory)
        known = next((found for path in manifests if (found := _read_manifest(path))), {})
        block_of = {name: (block, rest) for block, names in enumerate(self._block_names) for name, rest in names}
        shards: dict[str, dict[str, Any]] = {}
        for file in sorted({self._weight_map[name] for name in block_of}):
            shards[file] = self._shard_identity(file, block_of, known.get(file))
        if shards != known:
            _write_manifest(manifests, shards)
        return sorted(tensor for shard in shards.values() for tensor in shard["tensors"])

    def _shard_identity(
        self, file: str, block_of: dict[str, tuple[int, str]], known: dict[str, Any] | None
    ) -> dict[str, Any]:
        try:
            stat = self._path_of(file).stat()
        except OSError:
            if known is None:
                raise CheckpointError(
                    f"{self.name}: {file} is missing and {MANIFEST} does not know it; open the whole checkpoint once"
                ) from None
            return known
        if known is not None and (known["size"], known["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
            return known
        names = sorted(name for name, home in self._weight_map.items() if home == file and name in block_of)
        with self._open(file) as shard:
            tensors = [[*block_of[name], sample_hash(shard, self._entry(file, name), block_of[name])] for name in names]
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "tensors": tensors}


def find_blocks(names: Iterable[str], blocks: range) -> tuple[tuple[tuple[str, str], ...], ...] | None:
    """For each of `blocks`, (name, name after the block's index) of its tensors; None: the names do not number just
    these."""
    stacks: dict[str, dict[int, list[tuple[str, str]]]] = {}
    for name in names:
        found = re.match(r"((?:[^.]+\.)*?)([0-9]{1,4})\.(.+)", name)
        if found:
            stack = stacks.setdefault(found[1], {})
            stack.setdefault(int(found[2]), []).append((name, found[3]))
    for _, stack in sorted(stacks.items(), key=lambda item: "vision" in item[0] or "audio" in item[0]):
        if sorted(stack) == list(blocks):
            return tuple(tuple(sorted(stack[block])) for block in blocks)
    return None


def stable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without the entries that say how it was written."""
    return {key: value for key, value in config.items() if key not in _VOLATILE}


def write_identity(
    directory: Path, identity: str, licence: str | None = None, *, files: Mapping[str, int] | None = None
) -> None:
    """Record, in a checkpoint made here, the preimage of its digest: what its weights were made from; and its files
    with their sizes in bytes."""
    said: dict[str, Any] = {} if licence is None else {"licence": licence}
    if files is not None:
        said["files"] = dict(files)
    write_json(directory / MANIFEST, {"version": MANIFEST_VERSION, "identity": identity, **said})


def _written(directory: Path, entry: str) -> str | None:
    found = _load_manifest(directory / MANIFEST).get(entry)
    if not isinstance(found, str) or any("\ud800" <= char <= "\udfff" for char in found):  # half of a pair has no bytes
        return None
    return found


def _load_config(name: str, directory: Path) -> PretrainedConfig:
    try:
        with scratch_directory() as scratch:
            where = configuration_directory(name, directory, Path(scratch))
            # False, not unset: unset asks the user, in a prompt, whether to run the code that a checkpoint brings.
            config = AutoConfig.from_pretrained(where, local_files_only=True, trust_remote_code=False)
        text: PretrainedConfig = config.get_text_config(decoder=True)
        for each in (config, text):  # weights are read by us (formats.py); the library would want its own packages
            vars(each).pop("quantization_config", None)
    except CheckpointError:
        raise
    except Exception as error:  # somebody else's file; the library's readers raise whatever meets them first
        raise CheckpointError(f"{name} is not a model that transformers knows: {first_line(error)}") from error
    counts = (getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None))
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise CheckpointError(f"{name} ({config.model_type}) has no transformer blocks")
    for size, most in ((text.num_hidden_layers, _MAX_BLOCKS), (text.hidden_size, _MAX_HIDDEN)):
        if not isinstance(size, int) or not 0 < size <= most:
            raise CheckpointError(f"{name} claims {str(size)[:40]} blocks or hidden features; allowed are 1 to {most}")
    return text


def _refuse_others(name: str, directory: Path) -> None:
    """Say what is there where no safetensors model is."""
    if (directory / SINGLE).exists():
        return
    shards = sorted(directory.glob("*-of-*.safetensors"))
    if shards:
        raise CheckpointError(
            f"{name} holds {shards[0].name}, but no {INDEX}, which names the other parts; fetch it, too"
        )
    pickles = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt")) + sorted(directory.glob("*.pth"))
    if pickles:
        raise CheckpointError(
            f"{name} holds {pickles[0].name}: pickles can run code and are not read; convert it with "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )


def _manifest_paths(directory: Path) -> tuple[Path, ...]:
    key = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:32]
    try:
        return directory / MANIFEST, cache_directory() / "manifests" / f"{key}.json"
    except CheckpointError:  # a user without a home: the place beside the checkpoint has to do
        return (directory / MANIFEST,)


def _load_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and found.get("version") == MANIFEST_VERSION else {}


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    shards = _load_manifest(path).get("shards")
    if not isinstance(shards, dict):
        return {}
    return {file: entry for file, entry in shards.items() if _is_shard_identity(entry)}


def _is_shard_identity(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"size", "mtime_ns", "tensors"}:
        return False
    tensors = entry["tensors"]
    return isinstance(tensors, list) and all(_is_tensor_identity(tensor) for tensor in tensors)


def _is_tensor_identity(tensor: Any) -> bool:
    match tensor:
        case [int(), str(), str(total)]:
            return re.fullmatch(r"[0-9a-f]{64}", total) is not None
    return False


def _write_manifest(paths: Iterable[Path], shards: dict[str, dict[str, Any]]) -> None:
    """Write it to the first place that can be written; nowhere is fine too, it is computed again next time."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"version": MANIFEST_VERSION, "shards": shards})
        except OSError:
            continue
        return


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"cannot read {path}: it is no JSON object")
    return found


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
