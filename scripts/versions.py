"""Runs tests with the oldest or the newest releases that pyproject.toml allows, in a copy of the virtual environment.

    python scripts/versions.py oldest|newest [--part] [--note] [PYTEST ARGUMENTS]

The copy is .venv-oldest or .venv-newest: hard links to .venv, in which pip then installs the other releases. torch
stays as it is installed, since other releases come only as CUDA builds of gigabytes. `--part` runs the tests that touch
the insides of other libraries, in two minutes, with releases that were the newest within the last day. A run that
passes writes its versions into docs/versions.md if it was whole, or with `--note`, which says how it was run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PAGE = ROOT / "docs" / "versions.md"
ENDS = ("oldest", "newest")
SHOWN = ("torch", "transformers", "libp2p", "trio", "peft", "bitsandbytes", "starlette", "protobuf")
"""The libraries whose versions are said and kept in the page."""
KEPT = "torch"
WHOLE = (
    "tests/models", "tests/gateway", "tests/protocols", "tests/transport", "tests/dht", "tests/peer",
    "tests/swarm/test_adapters.py", "tests/swarm/test_client.py", "tests/swarm/test_generation.py",
    "tests/swarm/test_prefixes.py",
)  # fmt: skip
"""Models, client and gateway, and what reaches into libp2p, trio and protobuf."""
PART = (
    "tests/models/test_client_models.py", "tests/models/test_blocks.py", "tests/models/test_families.py",
    "tests/models/test_tuning.py", "tests/models/test_adapters.py", "tests/models/test_library_contract.py",
    "tests/models/test_client_check.py", "tests/transport/test_contract.py", "tests/protocols/test_generated.py",
)  # fmt: skip
PART_S = 600.0
"""Two minutes on a quiet machine; beside all other tests it takes longer."""
DAY_S = 86400
OFFLINE = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|Name or service not known|name resolution|ProxyError"
)
_TABLE = re.compile(r"(<!-- versions: written by scripts/versions.py -->\n).*?(<!-- end of versions -->)", re.DOTALL)


class NoNetwork(Exception):
    """pip cannot reach its index."""


def requirements(end: str, installed: dict[str, str]) -> list[str]:
    """What pip is to install: for the oldest end every lower bound, for the newest every range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    found = []
    for text in (*project["dependencies"], *extras["quant"], *extras["peft"]):
        requirement = Requirement(text)
        lowest = [each.version for each in requirement.specifier if each.operator == ">="]
        if requirement.name == KEPT:
            found.append(f"{KEPT}=={installed[KEPT]}")
        elif end == "oldest" and lowest:
            extra = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            found.append(f"{requirement.name}{extra}=={lowest[0]}")
        else:
            found.append(text)
    return found


def versions(python: Path) -> dict[str, str]:
    """What is installed there, of the libraries that are shown."""
    program = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run([python, "-c", program, *SHOWN], capture_output=True, text=True, check=True)
    return dict(zip(SHOWN, done.stdout.split(), strict=True))


def prepare(end: str, *, at_most_s: float) -> Path:
    """Make the copy, or bring it up to date when it is older than `at_most_s`; its Python.

    Raises: NoNetwork. SystemExit: pip finds no set of releases; its reasons are printed.
    """
    room = ROOT / f".venv-{end}"
    python, mark = room / "bin" / "python", room / "made"
    wanted = requirements(end, versions(VENV / "bin" / "python"))
    sign = "\n".join([*wanted, (VENV / "installed").read_text()])
    with_same = mark.is_file() and mark.read_text() == sign
    if with_same and time.time() - mark.stat().st_mtime < at_most_s:
        return python
    if not with_same:
        shutil.rmtree(room, ignore_errors=True)
        shutil.copytree(VENV, room, symlinks=True, copy_function=_link, ignore=_but_logs)
    mark.unlink(missing_ok=True)
    command = [python, "-m", "pip", "install", "--quiet", "--progress-bar", "off", "--disable-pip-version-check"]
    command += ["--upgrade", "--upgrade-strategy", "eager" if end == "newest" else "only-if-needed"]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        if OFFLINE.search(done.stderr):
            raise NoNetwork
        sys.exit(f"{done.stderr.strip()}\npetals: pip cannot install the {end} releases")
    mark.write_text(sign)
    return python


def _link(source: str, goal: str) -> None:
    try:
        os.link(source, goal)
    except OSError:  # another file system
        shutil.copy2(source, goal)


def _but_logs(folder: str, names: list[str]) -> set[str]:
    return {"log", "installed"} & set(names) if Path(folder) == VENV else set()


def run(python: Path, arguments: Sequence[str], *, timeout_s: float | None) -> tuple[int, str]:
    """pytest's exit status, and its counts in words."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            return 1, f"not finished after {timeout_s:.0f} s"
        if not report.exists():
            return done.returncode or 1, "pytest did not run"
        suite = ElementTree.parse(report).getroot()[0].attrib
    wrong = int(suite["failures"]) + int(suite["errors"])
    passed = int(suite["tests"]) - wrong - int(suite["skipped"])
    return done.returncode, f"{passed} passed, {wrong} failed, {suite['skipped']} skipped"


def note(end: str, found: dict[str, str], counts: str, how: str = "") -> None:
    """Write this end's column of the table, and the line that says where it comes from: `how` are its arguments."""
    text = PAGE.read_text(encoding="utf-8")
    kept = {row[0].strip("`"): list(row[1:]) for row in re.findall(r"\| (`\S+`) \| (\S*) \| (\S*) \|", text)}
    lines = ["| library | oldest | newest |", "|---|---|---|"]
    for name in SHOWN:
        row = kept.get(name, ["", ""])
        row[ENDS.index(end)] = found[name]
        lines.append(f"| `{name}` | {row[0]} | {row[1]} |")
    said = dict(re.findall(r"^- `scripts/test --(\w+)(.*`: .*)$", text, re.MULTILINE))
    python = ".".join(map(str, sys.version_info[:3]))
    said[end] = f"{how and ' ' + how}`: {counts}; Python {python}, {datetime.now(UTC):%Y-%m-%d}"
    lines += ["", *(f"- `scripts/test --{each}{said[each]}" for each in ENDS if each in said)]
    body = "\n".join(lines)
    PAGE.write_text(_TABLE.sub(lambda match: f"{match[1]}\n{body}\n\n{match[2]}", text), encoding="utf-8")


def main() -> int:
    """Install, say the versions, run, write them down; the exit status."""
    end, *arguments = sys.argv[1:]
    part = "--part" in arguments
    chosen = [each for each in arguments if each not in ("--part", "--note")]
    writes = "--note" in arguments or not (part or chosen)
    try:
        python = prepare(end, at_most_s=DAY_S if part or end == "oldest" else 0)
    except NoNetwork:
        sets = len(PART) if part else len(WHOLE)
        print(f"petals: skipped: {sets} sets of tests with the {end} releases: no network, pip reaches no index")
        return 0
    found = versions(python)
    said = ", ".join(f"{name} {version}" for name, version in found.items())
    print(f"petals: {end}: {said}", flush=True)
    tests = chosen or ([*PART] if part else [*WHOLE, "--numprocesses", "2", "--dist", "loadfile"])
    status, counts = run(python, tests, timeout_s=PART_S if part else None)
    if writes and status == 0:
        note(end, found, counts, " ".join(arguments).replace("--note", "").strip())
    print(f"petals: {end}: {counts} with {said}")
    return status


if __name__ == "__main__":
    if sys.argv[1:2] not in (["oldest"], ["newest"]):
        sys.exit("which end? python scripts/versions.py oldest|newest [--part] [--note] [PYTEST ARGUMENTS]")
    sys.exit(main())
