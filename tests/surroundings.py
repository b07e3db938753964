"""What tests run in: a home of their own, empty but for the default model, and caches that only tests use.

Nothing of the user's home or environment changes what a test sees, and no test changes anything there. Set up by
tests/conftest.py before anything else is imported; the workers of a run share the home of the first process.

    build/cache/       what tests download and build, for all runs: the default model, js-libp2p, pip's and npm's caches
    build/home-PID/    $HOME of one run; removed at its end

`python -m tests.surroundings` brings the default model into build/cache, from the user's cache if it is there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "cache"
DEFAULT_MODEL = "converted/b179c9523d0e6a0f98a330c7562b6827-v*"
"""Its folder below the cache of Petals: the SHA-256 of its GGUF file, the version of the conversion."""
NO_NETWORK = "no network"
"""How the reasons of tests begin that are skipped for want of one; they are counted apart (tests/conftest.py)."""
_HOME = "TESTS_HOME"
_OURS = ("PETALS_INTEROP", "PETALS_INTEROP_CACHE")
"""Variables for tests; all others that begin so are flags of commands, and would change what they do."""
_PLACES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "HF_HOME", "HF_HUB_CACHE",
           "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_TOKEN", "PYTHONPATH", "VIRTUAL_ENV")  # fmt: skip


def move_in() -> Path | None:
    """Change this process's environment; the home that was made, None when the parent process has made it."""
    if os.environ.get(_HOME):
        return None
    _sweep()
    (ROOT / "build").mkdir(exist_ok=True)
    home = ROOT / "build" / f"home-{os.getpid()}"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    _keep_package_settings(Path.home())
    bring_model(home / ".cache" / "petals")
    for name in [*_PLACES, *(name for name in os.environ if name.startswith("PETALS_") and name not in _OURS)]:
        os.environ.pop(name, None)
    os.environ |= {
        _HOME: str(home),
        "HOME": str(home),
        "MPLCONFIGDIR": str(CACHE / "matplotlib"),  # its table of fonts takes seconds to make
        "PETALS_LISTEN": "/ip4/127.0.0.1/tcp/0",  # commands stay on this machine, and do not look around on its network
    }
    return home


def move_out(home: Path | None) -> None:
    """Remove the home that `move_in` made."""
    if home is not None:
        shutil.rmtree(home, ignore_errors=True)


def bring_model(into: Path) -> bool:
    """Link the default model into a cache of Petals, if it is in the tests' cache or the user's; whether it is.

    The user's is copied: nothing that happens to the tests' files happens to it.
    """
    kept = CACHE / "petals"
    if not list(kept.glob(DEFAULT_MODEL)):
        for theirs in _users_cache().glob(DEFAULT_MODEL):
            if theirs.is_dir():
                _place(theirs, kept / theirs.relative_to(_users_cache()), shutil.copy2)
    found = [folder for folder in kept.glob(DEFAULT_MODEL) if folder.is_dir()]
    if into != kept:
        for folder in found:
            _place(folder, into / folder.relative_to(kept), os.link)
    return bool(found)


def _place(source: Path, goal: Path, copy: object) -> None:
    goal.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=goal.parent) as room:
        shutil.copytree(source, Path(room, "model"), copy_function=copy)  # type: ignore[arg-type]
        if not goal.exists():
            Path(room, "model").rename(goal)


def _users_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(os.environ.get("PETALS_CACHE") or (Path(base) if base else Path.home() / ".cache") / "petals")


def _keep_package_settings(home: Path) -> None:
    """pip and npm find packages as they do for the user; what they fetch is kept for the next run."""
    for variable, files in (
        ("PIP_CONFIG_FILE", (".config/pip/pip.conf", ".pip/pip.conf")),
        ("NPM_CONFIG_USERCONFIG", (".npmrc",)),
    ):
        for file in files:
            if (home / file).is_file():
                os.environ.setdefault(variable, str(home / file))
    os.environ["PIP_CACHE_DIR"] = str(CACHE / "pip")
    os.environ["NPM_CONFIG_CACHE"] = str(CACHE / "npm")


def _sweep() -> None:
    """Homes of runs that were killed."""
    for left in (ROOT / "build").glob("home-*"):
        try:
            os.kill(int(left.name.removeprefix("home-")), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (ValueError, PermissionError):
            continue


if __name__ == "__main__":
    if not bring_model(CACHE / "petals"):
        fetch = [sys.executable, "-m", "petals.models.source.hub"]
        sys.exit(
            subprocess.run(fetch, env=os.environ | {"PETALS_CACHE": str(CACHE / "petals")}, check=False).returncode
        )
