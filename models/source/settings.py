"""What `config.json` and `tokenizer.json` may set. They come from whoever made the checkpoint, and reach the library.

Honoured is what describes the model. Left out, and said in one line, is what would run other code (attention kernels
from a hub), change what calls return, or switch off what generation here is made of. `generation_config.json` is read
in models/client/generation_settings.py.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from petals.models.errors import CheckpointError

log = logging.getLogger(__name__)

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
MAX_SETTINGS_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 128 << 20
MAX_PATTERN = 4096

_PLAIN_ATTENTION = (None, "eager", "sdpa")
_HARMLESS: dict[str, tuple[object, ...]] = {
    # Others name code: "flash_attention_2" is installed by nobody who has not asked for it, "org/kernel" is downloaded.
    "attn_implementation": _PLAIN_ATTENTION,
    "_attn_implementation": _PLAIN_ATTENTION,
    "_attn_implementation_internal": _PLAIN_ATTENTION,
    "experts_implementation": (None, "eager"),
    "_experts_implementation": (None, "eager"),
    "_experts_implementation_internal": (None, "eager"),
    "use_kernels": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "return_dict": (None, True),
    "use_return_dict": (None, True),
    "torchscript": (None, False),
    "use_cache": (None, True),
    "gradient_checkpointing": (None, False),
    "chunk_size_feed_forward": (None, 0),
    "compile_config": (None,),
}
"""Entries of `config.json` that are read only with these values."""


def read_json(path: Path) -> dict[str, Any]:
    """An object of a file beside a checkpoint.

    Raises:
        CheckpointError: it can not be read, is too large, or no JSON object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SETTINGS_BYTES + 1)
        if len(data) > MAX_SETTINGS_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_SETTINGS_BYTES} bytes")
        found = json.loads(data)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return found


def configuration_directory(name: str, directory: Path, scratch: Path) -> Path:
    """Where the library should read `config.json`: in `directory`, or in `scratch` without what is not honoured.

    Raises: CheckpointError.
    """
    path = directory / CONFIG
    if not path.is_file():
        return directory  # the library says so
    config = read_json(path)
    left_out = sorted(set(_strip(config)))
    if not left_out:
        return directory
    log.warning("%s: config.json sets what is not honoured here, and left out: %s", name, ", ".join(left_out)[:300])
    (scratch / CONFIG).write_text(json.dumps(config))
    return scratch


def _strip(config: dict[str, Any], depth: int = 0) -> Iterator[str]:
    """Take what is not honoured out of a configuration and those inside it; yields names and values."""
    for key in [key for key, value in config.items() if key in _HARMLESS and value not in _HARMLESS[key]]:
        yield f"{key}={str(config.pop(key))[:60]}"
    for value in config.values():
        if isinstance(value, dict) and depth < 4:
            yield from _strip(value, depth + 1)


def check_tokenizer(name: str, directory: Path) -> None:
    """Refuse patterns that could take for ever on a short text: the tokenizer's library tries all ways to match.

    Raises: CheckpointError.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        return
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{path} has more than {MAX_TOKENIZER_BYTES} bytes")
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} has no usable tokenizer: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} has no usable tokenizer: {TOKENIZER} is no JSON object")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for pattern in _patterns(found.get(part)):
            if not is_tame(pattern):
                raise CheckpointError(f"{name} has a tokenizer whose pattern {pattern[:60]!r} could take for ever")


def _patterns(node: object, depth: int = 0) -> Iterator[str]:
    if depth > 16:
        return
    if isinstance(node, Mapping):
        regex = node.get("Regex")
        if isinstance(regex, str):
            yield regex
        for value in node.values():
            yield from _patterns(value, depth + 1)
    elif isinstance(node, list):
        for value in node:
            yield from _patterns(value, depth + 1)


def is_tame(pattern: str) -> bool:
    """Whether a pattern repeats no group that repeats something itself, or chooses: `(a+)+`, `(a|a)*`. What is left
    takes at most a power of the text's length."""
    if len(pattern) > MAX_PATTERN:
        return False
    plain = re.sub(r"\\(?:[pP]\{[^}]*\}|x\{[^}]*\}|.)", "x", pattern, flags=re.DOTALL)
    plain = re.sub(r"\[\^?\]?(?:[^\[\]]|\[:[^\]]*:\]|\[[^\[\]]*\])*\]", "x", plain)
    begun: list[int] = []
    for index, sign in enumerate(plain):
        if sign == "(":
            begun.append(index)
        elif sign == ")" and begun:
            inside = plain[begun.pop() + 1 : index]
            inside = re.sub(r"^\?(?:[a-zA-Z-]*:|[=!>]|<[=!]|<\w+>)", "", inside)
            repeated = re.match(r"[*+]|\{\d*,", plain[index + 1 :])
            if repeated and re.search(r"[*+|]|\{\d*,", inside):
                return False
    return True


def scratch_directory() -> tempfile.TemporaryDirectory[str]:
    """For `configuration_directory`; a context."""
    return tempfile.TemporaryDirectory(prefix="petals-config-")
