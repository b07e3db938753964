"""A fresh machine, as far as one can be had: the README's two commands in a clean clone.

    python scripts/fresh.py            scripts/demo and scripts/test, with everything downloaded and built anew
    python scripts/fresh.py --cheap    with this virtual environment: the command starts, plans and generates

HOME is empty, caches are, and of the environment there is only what says where packages come from: pip's and npm's
settings, certificates, proxies. Exit status 3: there is no network to fetch the model over.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = re.compile(
    r"PATH|LANG|LC_.*|TZ|USER|LOGNAME|SHELL|TERM|TMPDIR|PYENV_ROOT|PIP_.*|NPM_CONFIG_.*|SSL_CERT_.*|.*_CA_.*|.*CA_BUNDLE"
    r"|https?_proxy|no_proxy|all_proxy|HTTPS?_PROXY|NO_PROXY|ALL_PROXY"
)
"""Variables without which packages are not found, or no program at all."""
CACHES = frozenset({"PIP_CACHE_DIR", "NPM_CONFIG_CACHE"})
NO_NETWORK = 3
PROMPT = "A cat sat on"


def bare(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """The environment of somebody who has just installed the machine."""
    kept = {name: value for name, value in environment.items() if KEPT.fullmatch(name) and name not in CACHES}
    settings = Path(environment.get("HOME", "/"), ".config", "pip", "pip.conf")
    if settings.is_file():  # where this machine's packages are is the machine's business
        kept.setdefault("PIP_CONFIG_FILE", str(settings))
    kept["PATH"] = ":".join(each for each in kept.get("PATH", "").split(":") if not each.startswith(str(ROOT)))
    return kept | {"HOME": str(home)}


def whole(clone: Path, environment: Mapping[str, str]) -> int:
    """The README's two commands."""
    for command in ("scripts/demo", "scripts/test"):
        began = time.monotonic()
        print(f"petals: fresh: {command}", flush=True)
        status = subprocess.run([clone / command], cwd=clone, env=environment, check=False).returncode
        print(f"petals: fresh: {command} ended with {status} after {time.monotonic() - began:.0f} s", flush=True)
        if status:
            return status
    return 0


def cheap(clone: Path, environment: Mapping[str, str], home: Path) -> int:
    """Commands of the clone with this environment's libraries; the model's wheel comes from the tests' cache."""
    cached = {"PIP_CACHE_DIR": str(ROOT / "build" / "cache" / "pip")}
    command = [sys.executable, "-m", "petals.cli.main"]
    here = ["--listen", "/ip4/127.0.0.1/tcp/0", "--no_mdns"]
    for words, expected in (
        (["--help"], "peer"),
        (["peer", "--serve", "0:15", "--dry_run", *here], "0:15"),
        (["peer", "--serve", "0:30", "--generate", PROMPT, "--max_new_tokens", "8", *here], PROMPT),
    ):
        done = subprocess.run(
            [*command, *words], cwd=clone, env={**environment, **cached}, capture_output=True, text=True, check=False
        )
        if "cannot fetch" in done.stderr:
            print(f"no network: {done.stderr.splitlines()[-1]}", file=sys.stderr)
            return NO_NETWORK
        if done.returncode or expected not in done.stdout or "Traceback" in done.stderr:
            print(f"petals {' '.join(words)} ended with {done.returncode}\n{done.stdout}{done.stderr}", file=sys.stderr)
            return 1
        print(f"petals: fresh: petals {' '.join(words)}: fine", flush=True)
    print(done.stdout, end="", flush=True)
    strewn = {path.name for path in home.iterdir()} - {".cache", ".rustup"}  # pip asks rustc who it is
    if strewn:
        print(f"left in HOME: {', '.join(sorted(strewn))}", file=sys.stderr)
    return 1 if strewn else 0


def main() -> int:
    """Clone, run, say what happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cheap", action="store_true", help="with this virtual environment, in a minute")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="petals-fresh-") as folder:
        clone, home = Path(folder, "petals"), Path(folder, "home")
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        environment = bare(os.environ, home)
        return cheap(clone, environment, home) if options.cheap else whole(clone, environment)


if __name__ == "__main__":
    sys.exit(main())
