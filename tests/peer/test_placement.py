"""Placement: single choices, and a simulated swarm that must come to a good rest."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from petals.dht.records import ServerRecord, ServerState
from petals.peer.server.placement import choose_blocks, may_leave, should_move, supply
from petals.protocols.types import ModelId, PeerId

MODEL = ModelId("tiny", "ab" * 32)


def record(name: str, blocks: range, rps: float = 100.0, **fields: Any) -> ServerRecord:
    fields = {"state": ServerState.ONLINE} | fields
    return ServerRecord(
        model=MODEL, peer_id=PeerId(name), blocks=blocks, inference_rps=rps,
        sequence=1, issued_at=0, expires_at=1, **fields,
    )  # fmt: skip


def test_a_hole_is_filled_first() -> None:
    assert choose_blocks([], 8, 4, 100.0) == range(4)
    swarm = [record("a", range(4)), record("b", range(6, 8), rps=1.0)]
    assert choose_blocks(swarm, 8, 2, 100.0) == range(4, 6)
    assert choose_blocks(swarm, 8, 20, 100.0) == range(8)


def test_the_weakest_stretch_is_helped() -> None:
    swarm = [record("a", range(8)), record("b", range(3)), record("c", range(6, 8))]
    assert choose_blocks(swarm, 8, 3, 100.0) == range(3, 6)


def test_who_leaves_is_not_counted_on() -> None:
    swarm = [record("a", range(8)), record("b", range(4, 8), state=ServerState.DRAINING)]
    assert supply(swarm, 8) == [12.5] * 8


def test_nobody_leaves_blocks_that_nobody_else_holds() -> None:
    swarm = [record("only", range(4), rps=1000.0), record("weak", range(4, 8), rps=1.0)]
    assert should_move(swarm, PeerId("only"), 8, 4) is None


def test_who_still_loads_counts_as_an_average_server() -> None:
    swarm = [record("a", range(8), rps=80.0), record("b", range(4), rps=0.0, state=ServerState.JOINING)]
    assert supply(swarm, 8) == [30.0] * 4 + [10.0] * 4
    assert choose_blocks(swarm, 8, 4, 80.0) == range(4, 8)


def test_only_blocks_that_others_answer_for_may_be_left() -> None:
    me = record("me", range(4))
    for state in ServerState:
        swarm = [me, record("a", range(2)), record("b", range(2, 6), state=state)]
        assert may_leave(swarm, me.peer_id, me.blocks) == (state is ServerState.ONLINE)
    assert not may_leave([me], me.peer_id, me.blocks)


def test_a_clear_gain_is_taken_and_a_small_one_left() -> None:
    crowd = [record(f"c{n}", range(4)) for n in range(3)]
    assert should_move([*crowd, record("weak", range(4, 8), rps=50.0)], PeerId("c0"), 8, 4) == range(4, 8)
    even = [record("a", range(4)), record("b", range(4)), record("c", range(4, 8)), record("d", range(4, 8), rps=90.0)]
    assert all(should_move(even, each.peer_id, 8, 4) is None for each in even)
    assert should_move(even, PeerId("stranger"), 8, 4) is None


class Simulation:
    """Servers that join where they help most and look around, one after another, at random moments."""

    def __init__(self, seed: int, num_blocks: int) -> None:
        self.dice = random.Random(seed)
        self.num_blocks = num_blocks
        self.swarm: dict[str, ServerRecord] = {}
        self.capacity: dict[str, int] = {}
        self.names = 0
        self.moves = 0

    def join(self) -> None:
        name = f"peer{self.names}"
        self.names += 1
        rps = self.dice.choice([20.0, 50.0, 100.0, 200.0, 400.0])
        self.capacity[name] = self.dice.randint(3, 16)
        blocks = choose_blocks(self.swarm.values(), self.num_blocks, self.capacity[name], rps)
        self.swarm[name] = record(name, blocks, rps)

    def leave(self) -> None:
        del self.swarm[self.dice.choice(sorted(self.swarm))]

    def look_around(self) -> bool:
        """Everybody once, in random order; whether anybody moved."""
        moved = False
        for name in self.dice.sample(sorted(self.swarm), len(self.swarm)):
            held_before = self.held()
            place = should_move(list(self.swarm.values()), PeerId(name), self.num_blocks, self.capacity[name])
            if place is not None:
                self.swarm[name] = record(name, place, self.swarm[name].inference_rps)
                assert self.held() >= held_before  # never disjoint by moving
                self.moves += 1
                moved = True
        return moved

    def held(self) -> int:
        return sum(total > 0 for total in supply(self.swarm.values(), self.num_blocks))

    def speed(self) -> float:
        """Steps per second through the whole model."""
        return min(supply(self.swarm.values(), self.num_blocks))

    def optimum(self) -> float:
        """The best that simulated annealing finds, with everybody moving for free."""
        dice = random.Random(0)
        names = list(self.swarm)
        starts = [self.swarm[name].blocks.start for name in names]
        totals = supply(self.swarm.values(), self.num_blocks)
        best, energy, steps = min(totals), _energy(totals), 6000
        for step in range(steps):
            temperature = 0.5 * (1 - step / steps) + 1e-3
            index = dice.randrange(len(names))
            length = self.capacity[names[index]]
            start = dice.randint(0, self.num_blocks - length)
            each, tried = self.swarm[names[index]].inference_rps / length, list(totals)
            for offset in range(length):
                tried[starts[index] + offset] -= each
                tried[start + offset] += each
            if dice.random() < math.exp(min(0.0, (energy - _energy(tried)) / temperature)):
                totals, energy, starts[index] = tried, _energy(tried), start
                best = max(best, min(totals))
        return best


def _energy(totals: list[float]) -> float:
    return math.log(sum(max(total, 1e-3) ** -10 for total in totals))


@pytest.mark.parametrize("seed", range(6))
def test_a_swarm_under_churn_comes_to_rest_near_the_optimum(seed: int) -> None:
    simulation = Simulation(seed, num_blocks=32)
    for _ in range(40):
        simulation.join()
    reached: list[float] = []
    for _ in range(4):  # storms: a third leaves, others come
        for _ in range(13):
            simulation.leave()
        for _ in range(simulation.dice.randint(10, 16)):
            simulation.join()
        rounds = 0
        while simulation.look_around():
            rounds += 1
            assert rounds < 10, "oscillates"
        reached.append(simulation.speed() / simulation.optimum())
    assert min(reached) >= 0.9
    assert simulation.moves < 4 * len(simulation.swarm) / 2  # less than half of the servers move after a storm
