"""The user's cache directory: files that other processes may read meanwhile, folders that are there whole or not."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from petals.models.errors import CheckpointError

DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO}
)
"""What a directory answers that is full, read-only, somebody else's, or none."""


def cache_directory() -> Path:
    """Where converted checkpoints live: $PETALS_CACHE, else `petals` in the platform's cache directory.

    Raises: CheckpointError where the user has no home directory.
    """
    try:
        chosen = os.environ.get("PETALS_CACHE")
        if chosen:
            return Path(chosen).expanduser()
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "petals"
    except RuntimeError:  # pathlib's word for a user without HOME and without an entry in the system's list
        raise CheckpointError(
            "this user has no home directory to keep models in: name a directory with PETALS_CACHE=DIR"
        ) from None


def cannot_write(
    directory: Path, reason: str, *, needs_bytes: int | None = None, variable: str = "PETALS_CACHE"
) -> CheckpointError:
    """The error that says which directory, how much is needed there, and how to choose another one.

    Args:
        reason: the system's, such as "No space left on device".
        needs_bytes: about so much; None: not known.
        variable: of the environment, which names the directory.
    """
    room = ""
    if needs_bytes is not None:
        room = f"; about {max(1.0, needs_bytes / 1e6):,.0f} MB are needed"
        existing = next((each for each in (directory, *directory.parents) if each.is_dir()), None)
        if existing is not None:
            room += f", {shutil.disk_usage(existing).free / 1e6:,.0f} MB are free"
    return CheckpointError(
        f"cannot write to {directory}: {reason}{room}; choose another directory with {variable}=DIR, or make it "
        "writable and make room"
    )


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


def make_whole(
    goal: Path,
    is_whole: Callable[[Path], bool],
    make: Callable[[Path], None],
    waiting: Callable[[], None] = lambda: None,
) -> None:
    """Have the folder `goal` be there, whole: made now unless it is, and made again when it is not whole.

    It is made in a folder beside it, which gets its name at the end. Of several processes one makes it, the others wait
    for it; when that one dies, the next one sweeps up after it and begins anew.

    Args:
        goal: the folder; those above it are made.
        is_whole: looks at `goal`, which may not be there.
        make: fills the empty folder that it is given.
        waiting: called once if another process is at it.

    Raises:
        OSError: the disk is full or can not be written. What `make` raises; then nothing of it is left.
    """
    if is_whole(goal):
        return
    goal.parent.mkdir(parents=True, exist_ok=True)
    with _locked(goal.with_name(f"{goal.name}.lock"), waiting):
        if is_whole(goal):
            return
        _sweep_up(goal)  # after a process that was killed: we hold its lock
        room = Path(tempfile.mkdtemp(dir=goal.parent, prefix=f"{goal.name}.", suffix=".part"))
        try:
            make(room)
            room.chmod(0o755)
            _flush(room)
            if goal.exists():
                goal.rename(room.with_suffix(".old.part"))
            room.rename(goal)
        finally:
            _sweep_up(goal)
    if not is_whole(goal):
        raise OSError(f"{goal} is not whole though it was just made")


def sizes_of(folder: Path) -> dict[str, int]:
    """The files right in `folder`, and their bytes: what `make_whole` may look at later."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}


def _sweep_up(goal: Path) -> None:
    for left in goal.parent.glob(f"{glob.escape(goal.name)}.*.part"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """A lock between processes, which ends with its holder: it never goes stale. Threads exclude each other, too."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _flush(folder: Path) -> None:
    """Names must not reach the disk before what they name: after a power cut it would look whole."""
    for path in (*folder.rglob("*"), folder):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
