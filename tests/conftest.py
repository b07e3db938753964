"""Settings for all tests: their surroundings, their order, their dice, and what is said at the end."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.surroundings import NO_NETWORK, ROOT, move_in, move_out

_home = move_in()  # before anything asks where home is

from hypothesis import settings  # noqa: E402

# Two busy cores make any deadline a coin toss; pytest-timeout ends what hangs.
settings.register_profile("petals", deadline=None)
settings.load_profile("petals")

LONG = (
    "test_storms", "test_readme", "test_generation", "test_muxer", "test_commands", "test_processes", "test_scripts",
    "test_routers", "test_site", "test_pages", "test_packaging", "test_private_page", "test_chat", "test_client",
    "test_failover", "test_status", "test_docs", "test_examples", "test_model_directories", "test_bootstrap_away",
)  # fmt: skip
"""Files that take longest, which start first: one at the end would have one worker to itself and the others idle."""
SKIPPED = ROOT / ".venv" / "log" / "skipped"
"""What was skipped, for the last line of scripts/test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shuffle", metavar="SEED", help="run files, and tests in them, in a random order; `new` draws a seed"
    )
    parser.addoption(
        "--dice", metavar="SEED", type=int, default=0, help="other random numbers for tests that draw some"
    )


def pytest_configure(config: pytest.Config) -> None:
    # xdist's own order is by number of tests: a file of one long test would come last.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    if config.option.shuffle == "new":  # drawn once: workers are given the options of the first process
        config.option.shuffle = str(random.SystemRandom().randrange(1 << 16))


def pytest_report_header(config: pytest.Config) -> str | None:
    return f"order: --shuffle {config.option.shuffle}" if config.option.shuffle else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long ones, then whole swarms and what starts processes, then the rest; each file in its own order."""
    if config.option.shuffle:
        shuffle(items, config.option.shuffle)
        return

    def place(item: pytest.Item) -> tuple[int, bool]:
        name = item.path.stem
        return LONG.index(name) if name in LONG else len(LONG), item.path.parent.name not in ("swarm", "tests")

    items.sort(key=place)


def shuffle(items: list[pytest.Item], seed: str) -> None:
    """Files in random order, the tests of each in random order."""
    files: dict[Path, float] = {}
    dice = random.Random(seed)
    places = []
    for item in sorted(items, key=lambda item: item.nodeid):
        files.setdefault(item.path, dice.random())
        places.append((files[item.path], dice.random(), item))
    items[:] = [item for _, _, item in sorted(places, key=lambda place: place[:2])]


@pytest.fixture(autouse=True)
def _dice(request: pytest.FixtureRequest) -> None:
    """A test that draws from the global generators draws the same whatever ran before it; --dice gives others."""
    seed = zlib.crc32(request.node.nodeid.encode()) + request.config.option.dice
    random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """pytest-trio forgets why an asynchronous test was skipped."""
    report = yield
    if report.skipped and call.excinfo is not None and isinstance(report.longrepr, tuple):
        path, line, _ = report.longrepr
        report.longrepr = (path, line, f"Skipped: {reason_of(call.excinfo.value)}")
    return report


def reason_of(error: BaseException | None) -> str:
    """What `pytest.skip` was told, by whatever was raised from it; empty: nothing."""
    if error is None:
        return ""
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    own = error.msg or "" if isinstance(error, pytest.skip.Exception) else ""
    return own or next(filter(None, map(reason_of, (*inner, error.__context__))), "")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Nothing is left out in silence."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.getreports("skipped"):
        if isinstance(report.longrepr, tuple):
            reasons[report.longrepr[2].removeprefix("Skipped: ").splitlines()[0]] += 1
    line = skipped_line(reasons)
    if line:
        terminalreporter.write_line(line)
    # Not from a copy of the environment with other releases, whose tests run beside (scripts/versions.py).
    if Path(sys.prefix) == ROOT / ".venv" and SKIPPED.parent.is_dir() and not os.environ.get("PYTEST_XDIST_WORKER"):
        SKIPPED.write_text(f"{line}\n" if line else "")


def skipped_line(reasons: Counter[str]) -> str:
    """How many tests were skipped, why, and how many of them for want of a network; empty: none."""
    if not reasons:
        return ""
    offline = sum(count for reason, count in reasons.items() if reason.startswith(NO_NETWORK))
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    return f"skipped: {reasons.total()} tests, {offline} of them for want of a network: {listed}"


def pytest_unconfigure() -> None:
    move_out(_home)
