"""benchmarks/churn.py: what it calls missing or dead, and a small run of it."""

from __future__ import annotations

import math

import pytest

from benchmarks.churn import Life, Look, play
from petals.protocols.types import PeerId


def test_who_must_be_listed_and_who_must_not() -> None:
    look = Look(reader=1, started=10.0, ended=11.0, cpu_s=0.1, queued_s=0.0, late_s=0.0, found=frozenset({PeerId("a")}))
    assert Life(announced=9.0).must_be_in(look)
    assert not Life(announced=10.5).must_be_in(look)  # in the middle of it: either answer is right
    assert not Life(announced=9.0, struck=10.5, dead=10.6).must_be_in(look)
    assert not Life(announced=9.0, struck=10.5, dead=10.6).must_not_be_in(look)
    assert Life(announced=9.0, struck=9.5, dead=9.6).must_not_be_in(look)
    assert not Life().must_be_in(look)


@pytest.mark.swarm
async def test_a_small_swarm_of_processes_comes_and_goes(capsys: pytest.CaptureFixture[str]) -> None:
    scene = await play(peers=4, n_readers=1, events=2, storms=1, watch_s=0.0)
    assert "2 of 4 killed at one moment" in capsys.readouterr().out
    assert len(scene.servers) == 4
    alive = {server.peer_id for server in scene.servers}
    assert any(look.found == alive for look in scene.looks)
    dead = [life for life in scene.lives.values() if life.dead < math.inf]
    assert len(dead) == 3
    for look in scene.looks:
        assert not {peer for peer, life in scene.lives.items() if life.must_not_be_in(look)} & look.found
