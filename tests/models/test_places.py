"""Places that are full, read-only, or none: one line says which directory, how much is needed, and which variable."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from petals.models.errors import CheckpointError
from petals.models.source import hub
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.disk import cache_directory, cannot_write
from tests.cli.test_commands import ENVIRONMENT, PETALS, ROOT
from tests.models.test_checkpoint import write_gguf


def fails(error: Exception) -> Callable[..., Any]:
    def make(*_: Any, **__: Any) -> None:
        raise error

    return make


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
    ],
    ids=["full", "read-only", "foreign", "full for safetensors"],
)
def test_a_cache_that_can_not_be_written(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PETALS_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "small.gguf")
    monkeypatch.setattr(hub, "make_whole", fails(error))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "small.gguf", progress=lambda line: None)
    line = str(caught.value)
    assert line.startswith(f"cannot write to {tmp_path / 'cache'}: ")
    assert said in line
    assert "MB are needed, " in line
    assert "PETALS_CACHE=DIR" in line
    assert "\n" not in line


def test_a_cache_below_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "small.gguf")
    monkeypatch.setenv("PETALS_CACHE", str(tmp_path / "small.gguf" / "cache"))
    with pytest.raises(CheckpointError, match=r"cannot write to .*Not a directory"):
        open_checkpoint(tmp_path / "small.gguf", progress=lambda line: None)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PETALS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", fails(RuntimeError("Could not determine home directory.")))
    with pytest.raises(CheckpointError, match=r"no home directory .* PETALS_CACHE=DIR"):
        cache_directory()
    with pytest.raises(CheckpointError, match="no such home directory"):
        open_checkpoint("~nobody_here/model")


def test_how_much_is_needed_and_free(tmp_path: Path) -> None:
    line = str(cannot_write(tmp_path / "not" / "there", "full", needs_bytes=2_000_000_000))
    assert "about 2,000 MB are needed, " in line
    assert "MB are free" in line


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "http://[::bad"])
def test_a_proxy_that_can_not_be_used(proxy: str) -> None:
    words = ["peer", "somebody/model", "--serve", "0:1", "--new_swarm", "--no_mdns"]
    environment = {**ENVIRONMENT, "HTTPS_PROXY": proxy, "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [*PETALS, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 2, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("petals: cannot fetch 'somebody/model' from the hub: ")
    assert last.endswith("check HTTPS_PROXY")
    assert "Traceback" not in run.stderr
