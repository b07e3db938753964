"""The user's cache directory, and files in it that other processes may read meanwhile."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_directory() -> Path:
    """Where converted checkpoints live: $PETALS_CACHE, else `petals` in the platform's cache directory."""
    chosen = os.environ.get("PETALS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "petals"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Atomically, so that another process sees the old file or the new one. Raises OSError."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
