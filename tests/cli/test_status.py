"""`petals status` as people run it, against real servers; and the verdict, by itself."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.cli.status.plots import bars
from petals.cli.status.render import describe, picture
from petals.cli.status.status import as_json
from petals.dht.health import copies_of, health, weakest_stretch
from petals.dht.records import ServerRecord, ServerState
from petals.peer.accounting.ledger import Ledger, ledger_path, write_ledger
from petals.peer.base.identity import create_identity
from petals.peer.membership.observer import ModelStatus, read_contribution
from petals.protocols.errors import UserError
from petals.protocols.types import ModelId, PeerId
from tests.cli.test_commands import NOBODY, run, serving
from tests.models.tiny import CASES, save_tiny

MODEL = ModelId("m", "ab" * 32)


def a_record(blocks: range, state: ServerState = ServerState.ONLINE) -> ServerRecord:
    return ServerRecord(
        model=MODEL, peer_id=PeerId("p"), blocks=blocks, state=state, sequence=1, issued_at=0, expires_at=1
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("tiny-status")
    save_tiny(next(case for case in CASES if case.id == "llama"), directory)
    return str(directory)


def test_a_swarm_is_described_for_people_and_machines(model: str) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(
            serving("peer", model, "--serve", "0:3", "--throughput", "100", "--public_name", "bob\x1b[2J")
        )
        addr = first["addrs"][0]
        broken = run("status", "--initial_peers", addr)
        assert broken.returncode == 0, broken.stderr
        assert "broken, nobody holds blocks 3:4" in broken.stdout
        assert "copies of each: 1110" in broken.stdout
        assert "\x1b" not in broken.stdout, "a stranger's name is no command for somebody's terminal"
        second = stack.enter_context(
            serving("peer", model, "--serve", "2:4", "--throughput", "50", "--initial_peers", addr)
        )
        seen = run("status", "--initial_peers", second["addrs"][0], "--json")
        (status,) = json.loads(seen.stdout)["models"]
        assert status["health"] == "degraded"
        assert status["copies"] == [1, 1, 2, 1]
        assert status["num_blocks"] == 4
        assert status["weakest"] == [0, 2]
        assert [(peer["peer_id"], peer["blocks"]) for peer in status["peers"]] == [
            (first["peer_id"], [0, 3]),
            (second["peer_id"], [2, 4]),
        ]
        assert [peer["decode_blocks_per_s"] for peer in status["peers"]] == [100, 50]
        assert all(peer["state"] == "online" for peer in status["peers"])


def test_round_trips_are_told_nearest_first_and_of_peers_that_are_shown() -> None:
    ids = [PeerId(f"peer-{letter * 6}") for letter in "abc"]
    records = [replace(a_record(range(4)), peer_id=peer) for peer in ids]
    told = {ids[1]: 0.2, ids[2]: 0.0015, PeerId("gone-zzzzzz"): 0.1}
    records[0] = replace(records[0], round_trips_s=told)
    text = describe(as_json(ModelStatus(MODEL, tuple(records))))
    assert text.splitlines()[-1] == "round trips from …aaaaaa to …cccccc 1.5 ms, …bbbbbb 200.0 ms"


def test_a_bootstrap_peer_leads_to_those_who_serve(model: str) -> None:
    with serving("peer", "--bootstrap") as keeper, ExitStack() as stack:
        addr = keeper["addrs"][0]
        stack.enter_context(serving("peer", model, "--serve", "0:4", "--throughput", "100", "--initial_peers", addr))
        seen = run("status", "--initial_peers", addr, "--json")
        assert seen.returncode == 0, seen.stderr
        assert json.loads(seen.stdout)["models"][0]["copies"] == [1, 1, 1, 1]


def test_a_peer_of_ones_own_says_what_it_gave_and_took(tmp_path: Path) -> None:
    key = tmp_path / "my.key"
    ledger = Ledger(create_identity(key).peer_id, time.time)
    with pytest.raises(UserError, match="there is no ledger"):
        read_contribution(key)
    ledger.took(PeerId("12D3KooWfriend"), 120_000)
    ledger.gave(PeerId("12D3KooWfriend"), 20_000)
    write_ledger(ledger_path(key), ledger.dump())
    seen = run("status", "--identity", str(key))
    assert seen.returncode == 0, seen.stderr
    assert "given 20,000 block-tokens, taken 120,000" in seen.stdout
    (friend,) = read_contribution(key)["peers"]
    assert (friend["peer_id"], friend["given"], friend["taken"]) == ("12D3KooWfriend", 20_000, 120_000)


def test_mistakes_are_one_line() -> None:
    nobody = run("status", "--initial_peers", NOBODY)
    assert nobody.returncode == 2
    assert nobody.stderr.count("\n") == 1
    assert "no initial peer answers" in nobody.stderr
    with serving("peer", "--bootstrap") as keeper:
        empty = run("status", "--initial_peers", keeper["addrs"][0])
        assert empty.returncode == 2
        assert "nobody there serves a model" in empty.stderr
    assert run("status").returncode == 2


TOLD = {
    "peer_id": "12D3KooW-ourself",
    "models": [
        {
            "model": "a/model\x1b[2J",
            "health": "degraded",
            "words": "there is only one copy of blocks 60:126; when a holder leaves, nobody can ask",
            "copies": [2] * 60 + [1] * 66,
            "peers": [
                as_json(
                    ModelStatus(
                        MODEL,
                        (
                            replace(
                                a_record(range(60, 126)),
                                peer_id=PeerId("12D3KooW-abcdef"),
                                public_name="a name as long as names may be " * 6,
                                inference_rps=12345,
                                cache_tokens_left=1_234_567,
                                reachability="relayed",
                                version="0.1.0",
                            ),
                        ),
                        {PeerId("12D3KooW-abcdef"): "punched"},
                    )
                )["peers"][0]
                | {"round_trip_s": 0.012, "banned_s": 3.0},
            ],
            "sessions": [
                {
                    "route": [
                        {"peer_id": "12D3KooW-ourself", "blocks": [0, 60], "round_trip_s": 0.01},
                        {"peer_id": "12D3KooW-abcdef", "blocks": [60, 126], "round_trip_s": 0.031},
                    ],
                    "tokens": 120,
                    "tokens_per_s": 8.31,
                },
                {"route": [], "tokens": 0, "tokens_per_s": 0.0},
            ],
        }
    ],
    "history": {
        "period_s": 5.0,
        "samples": [
            {"generated_per_s": float(each), "prompt_per_s": 0.0, "answers": each % 2, "sessions": 0}
            for each in range(100)
        ],
    },
    "contribution": {"given": 12_000, "taken": 340_000, "peers": []},
}


@pytest.mark.parametrize("width", [80, 120, None])
def test_what_a_peer_tells_fits_the_terminal(width: int | None) -> None:
    text = picture(TOLD, width=width, plot_height=3)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert width is None or max(map(len, lines)) <= width
    said = " ".join(text.split())
    assert "as peer …urself sees it" in said
    assert "a/model[2J: degraded, there is only one copy of blocks 60:126; when a holder leaves" in said
    assert "".join(said.partition("copies of each:")[2].partition("blocks peer")[0].split()).count("1") >= 66
    assert "avoided" in said
    assert "round trips from this peer to …abcdef 12.0 ms" in said
    assert "routes now (2): 120 tokens, 8.3 tokens/s: 0:60 by itself (10.0 ms) => 60:126 via …abcdef (31.0 ms)" in said
    assert "reads its prompt" in said
    assert "throughput of this peer over the last 8 min" in said
    assert "tokens generated per second: now 99, at most 99" in said
    assert "prompt tokens per second: none" in said
    assert "sessions served" not in said, "the peer that is asked serves nothing"
    assert "given 12,000 block-tokens, taken 340,000" in said


def test_peers_stand_in_the_order_of_their_blocks() -> None:
    """A peer's view of the swarm has an order of its own."""
    records = [replace(a_record(blocks), peer_id=PeerId(f"p{blocks}")) for blocks in (range(2, 4), range(2))]
    rows = describe(as_json(ModelStatus(MODEL, tuple(records)))).splitlines()[3:]
    assert [row.split()[0] for row in rows] == ["0:2", "2:4"]


def test_colours_are_for_those_who_want_them() -> None:
    assert "degraded" in picture(TOLD, width=80)
    assert "\x1b[33mdegraded\x1b[0m," in picture(TOLD, width=80, bright=True)


def test_a_plot_shows_every_peak_and_nothing_that_was_not() -> None:
    assert bars([0, 1, 2, 4, 8], 5) == [" ▁▂▄█"]
    assert bars([0, 8, 16], 6, 2) == ["    ██", "  ████"]
    assert bars([0.0] * 99 + [1.0], 10) == [" " * 9 + "█"]
    assert bars([1000, 1], 2, 3)[2] == "█▁", "little is not nothing"
    assert bars([], 5) == [""]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=400), st.integers(1, 120), st.integers(1, 4))
def test_a_plot_is_as_large_as_there_is_room(values: list[float], width: int, height: int) -> None:
    lines = bars(values, width, height)
    assert len(lines) == height
    assert all(len(line) <= width for line in lines)
    assert ("█" in lines[0]) == any(values)


def test_torch_is_not_imported_for_it() -> None:
    import subprocess

    code = (
        "import sys; import petals.cli.status.status, petals.peer.membership.observer, petals.cli.status.client; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8), st.sampled_from(ServerState)), max_size=8))
def test_the_verdict_is_that_of_the_weakest_block(held: list[tuple[int, int, ServerState]]) -> None:
    records = [a_record(range(start, min(8, start + size)), state) for start, size, state in held]
    copies = copies_of(records, 8)
    for block, count in enumerate(copies):
        assert count == sum(r.state is ServerState.ONLINE and block in r.blocks for r in records)
    weakest = weakest_stretch(copies)
    assert all(copies[block] == min(copies) for block in weakest)
    assert health(copies)[0] == {0: "broken", 1: "degraded"}.get(min(copies), "healthy")


def test_all_blocks_are_called_so() -> None:
    assert health([1, 1])[1].startswith("there is only one copy of all blocks")
