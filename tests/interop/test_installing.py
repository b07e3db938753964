"""Foreign peers are installed whole or not at all, whatever earlier runs left and however many workers there are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.interop import foreign
from tests.interop.foreign import COMPLETE, install, install_js, is_installed

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]


def make(room: Path) -> None:
    (room / "below").mkdir()
    (room / "below" / "peer").write_text("program")
    (room / "link").symlink_to("below")


@pytest.mark.parametrize(
    "damage",
    [
        lambda goal: (goal / "below" / "peer").unlink(),
        lambda goal: (goal / "below" / "peer").write_text(""),
        lambda goal: (goal / COMPLETE).write_text(""),
        lambda goal: (goal / COMPLETE).unlink(),
        lambda goal: shutil.rmtree(goal / "below"),
        lambda goal: [shutil.rmtree(goal / "below"), (goal / COMPLETE).write_text(json.dumps({}))],
    ],
)
def test_an_installation_that_is_broken_is_made_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    goal = tmp_path / "peer-1"
    install(goal, make)
    install(goal, lambda room: pytest.fail("made twice"))
    damage(goal)
    assert not is_installed(goal)
    install(goal, make)
    assert is_installed(goal)
    assert (goal / "below" / "peer").read_text() == "program"


def test_a_failure_leaves_nothing_that_looks_installed(tmp_path: Path) -> None:
    def fail(room: Path) -> None:
        make(room)
        foreign.fetch(["false"], room)

    with pytest.raises(pytest.skip.Exception, match="no network: false brings nothing"):
        install(tmp_path / "peer-1", fail)
    assert {path.name for path in tmp_path.iterdir()} == {"peer-1.lock"}
    install(tmp_path / "peer-1", make)


def test_js_is_installed_by_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the workers of a run do on a fresh machine; and again over the empty folder that such a run once left."""
    monkeypatch.setenv("PETALS_INTEROP_CACHE", str(tmp_path))
    goal = install_js().parent
    shutil.rmtree(goal)
    goal.mkdir()
    (goal / "complete").touch()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: install_js(), range(4))) == {goal / "peer.mjs"}
    assert (goal / "node_modules" / "libp2p" / "package.json").is_file()
