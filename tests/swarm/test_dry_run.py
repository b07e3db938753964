"""--dry_run: what it says is what the real thing does, and nothing is loaded or asked for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from petals.cli.dry_run import show_plan
from petals.models.source.checkpoint import Checkpoint
from petals.peer.base.config import PeerConfig, ServeConfig, Timeouts
from petals.peer.client.model_client import ClientOptions
from petals.protocols.errors import MissingBlocks, UserError
from tests.cli.test_commands import run
from tests.models.tiny import CASES, save_tiny
from tests.swarm.conftest import Swarm

MakeSwarm = Callable[[str | None], Swarm]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and reading weights fails from then on."""

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    return lambda: monkeypatch.setattr(Checkpoint, "read", read)


async def test_it_foretells_what_a_server_does(
    make_swarm: MakeSwarm,
    tmp_path: Path,
    no_weights: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_tiny(next(case for case in CASES if case.id == "llama"), tmp_path, stored=torch.float16)
    swarm = make_swarm(str(tmp_path))
    first = await swarm.add(range(2))
    settings = ServeConfig(num_blocks=2, throughput=100.0, cache_bytes=1 << 20)
    config = PeerConfig(model=swarm.model, serve=settings, initial_peers=first.addrs, timeouts=Timeouts(route_s=0.1))

    said: list[str] = []

    async def shown(serve: ServeConfig | None, client: ClientOptions | None) -> tuple[dict[str, Any], str]:
        wanted = replace(config, serve=serve)
        await show_plan(wanted, client, 8, said.append, as_json=True)
        found = json.loads(capsys.readouterr().out)
        await show_plan(wanted, client, 8, said.append, as_json=False)
        return found, capsys.readouterr().out

    no_weights()
    plan, text = await shown(settings, ClientOptions())
    assert plan["serve"]["blocks"] == [2, 4]
    assert plan["serve"]["copies"] == {"now": [1, 1, 0, 0], "then": [1, 1, 1, 1]}
    assert plan["serve"]["health"] == {"now": "broken", "then": "degraded"}
    assert plan["serve"]["fits"]
    assert plan["ask"] == {"expected_route": None, "skipped": [], "brought": [2, 3], "missing": []}
    assert "would hold blocks 2:4" in text
    assert "blocks 2:4 are where one more helps most: nobody holds blocks 2:4" in text
    assert "would compute blocks 2:4 by itself" in text
    plan, text = await shown(ServeConfig(blocks=range(3, 4)), ClientOptions())
    assert plan["ask"]["missing"] == [2]
    assert "would find nobody for blocks 2:3" in text
    with pytest.raises(MissingBlocks, match=r"blocks 2:4"):
        await shown(None, ClientOptions())
    with pytest.raises(UserError, match=r"blocks 0:4"):
        await shown(ServeConfig(blocks=range(3, 5)), None)
    plan, text = await shown(ServeConfig(cache_bytes=1 << 60, blocks=range(2)), None)
    assert not plan["serve"]["fits"]
    assert "this does not fit" in text
    monkeypatch.undo()

    second = await swarm.add(None, num_blocks=2, cache_bytes=1 << 20)
    assert second.server is not None
    assert second.server.span.blocks == range(2, 4)
    foretold = (await first.plan(settings)).weight_bytes
    assert second.server.span.weight_bytes == pytest.approx(foretold, rel=0.05)
    no_weights()
    plan, text = await shown(None, ClientOptions())
    assert [(hop["peer_id"], hop["blocks"]) for hop in plan["ask"]["expected_route"]] == [
        (first.peer_id, [0, 2]),
        (second.peer_id, [2, 4]),
    ]
    assert "serve" not in plan
    assert text.startswith("would ask 0:2 via …")
    assert "ms a token expected" in text


def test_the_command_says_it_and_ends(tmp_path: Path) -> None:
    save_tiny(next(case for case in CASES if case.id == "llama"), tmp_path / "model")
    key = tmp_path / "new.key"
    done = run("peer", str(tmp_path / "model"), "--serve", "--identity", str(key), "--dry_run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["serve"]["blocks"] == [0, 4]
    assert not key.exists()
