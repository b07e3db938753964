"""Settings for all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Peers that tests start as commands stay on this machine, and do not look around on its network.
os.environ.setdefault("PETALS_LISTEN", "/ip4/127.0.0.1/tcp/0")

# Two busy cores make any deadline a coin toss; pytest-timeout ends what hangs.
settings.register_profile("petals", deadline=None)
settings.load_profile("petals")

LONG = (
    "test_storms", "test_readme", "test_generation", "test_muxer", "test_commands", "test_processes", "test_scripts",
    "test_routers", "test_site", "test_pages", "test_packaging", "test_private_page", "test_chat", "test_client",
    "test_failover", "test_status", "test_docs", "test_examples",
)  # fmt: skip
"""Files that take longest, which start first: one at the end would have one worker to itself and the others idle."""


def pytest_configure(config: pytest.Config) -> None:
    # xdist's own order is by number of tests: a file of one long test would come last.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones, then whole swarms and what starts processes, then the rest; each file in its own order."""

    def place(item: pytest.Item) -> tuple[int, bool]:
        name = item.path.stem
        return LONG.index(name) if name in LONG else len(LONG), item.path.parent.name not in ("swarm", "tests")

    items.sort(key=place)
