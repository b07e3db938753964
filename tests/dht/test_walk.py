"""Kademlia's search on a network of the test's own, under a clock that jumps."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
import trio
import trio.testing

from petals.dht.walk import walk

NODES = 500


class Network:
    """Nodes that know some others, nearer ones better, as Kademlia's buckets do."""

    def __init__(self, seed: int) -> None:
        dice = random.Random(seed)
        self.ids = [dice.getrandbits(64) for _ in range(NODES)]
        self.known: dict[int, list[int]] = {}
        for node in self.ids:
            buckets: dict[int, list[int]] = {}
            for other in self.ids:
                if other != node:
                    buckets.setdefault((node ^ other).bit_length(), []).append(other)
            self.known[node] = [
                each for bucket in buckets.values() for each in dice.sample(bucket, min(8, len(bucket)))
            ]
        self.dead: set[int] = set()
        self.frozen: set[int] = set()
        self.asked: list[int] = []

    def nearest(self, target: int, count: int) -> list[int]:
        alive = (node for node in self.ids if node not in self.dead | self.frozen)
        return sorted(alive, key=lambda node: node ^ target)[:count]

    async def search(self, target: int, want: int = 6) -> list[int]:
        async def ask(node: int) -> Iterable[int] | None:
            self.asked.append(node)
            if node in self.frozen:
                await trio.sleep_forever()
            await trio.sleep(0.01)
            if node in self.dead:
                return None
            return sorted(self.known[node], key=lambda other: other ^ target)[:20]

        seeds = [node for node in self.ids if node not in self.dead | self.frozen][:3]
        return await walk(seeds, lambda node: node ^ target, ask, want=want, patience_s=0.4, total_s=2.0)


@pytest.mark.parametrize("seed", range(5))
async def test_the_nearest_are_found_with_few_questions(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    network = Network(seed)
    target = random.Random(seed).getrandbits(64)
    assert await network.search(target) == network.nearest(target, 6)
    assert len(network.asked) == len(set(network.asked)) < 40


@pytest.mark.parametrize("seed", range(5))
async def test_dead_and_frozen_nodes_cost_one_patience(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    network = Network(seed)
    dice = random.Random(seed)
    target = dice.getrandbits(64)
    near = network.nearest(target, 12)
    network.dead, network.frozen = set(near[:3]), set(near[3:6])
    network.frozen |= set(dice.sample(network.ids, 100)) - network.dead
    found = await network.search(target)
    assert len(set(found) & set(network.nearest(target, 6))) >= 5
    assert trio.current_time() <= 2.0  # of the test's own clock


async def test_nobody_to_ask_and_nobody_who_answers(autojump_clock: trio.testing.MockClock) -> None:
    async def silent(node: int) -> None:
        await trio.sleep_forever()

    async def failing(node: int) -> None:
        await trio.lowlevel.checkpoint()

    assert await walk([], int, failing, want=3, patience_s=0.4, total_s=2.0) == []
    assert await walk([1, 2], int, failing, want=3, patience_s=0.4, total_s=2.0) == []
    assert trio.current_time() == 0
    assert await walk([1, 2], int, silent, want=3, patience_s=0.4, total_s=2.0) == []
    assert trio.current_time() == 2.0


async def test_a_slow_link_alone_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    async def slow(node: int) -> list[int]:
        await trio.sleep(0.9)
        return [1, 2, 3]

    assert await walk([1], int, slow, want=3, patience_s=0.4, total_s=5.0) == [1, 2, 3]


async def test_a_liar_who_names_thousands_does_not_keep_us(autojump_clock: trio.testing.MockClock) -> None:
    asked = []

    async def ask(node: int) -> Iterable[int] | None:
        asked.append(node)
        await trio.sleep(0.01)
        return [5, 6] if node < 10 else range(10_000, 20_000) if node == 10 else None

    found = await walk(
        [10, 5], lambda node: 20_000 - node if node > 10 else node, ask, want=2, patience_s=0.4, total_s=9
    )
    assert found == [5, 6]
    assert len(asked) < 10
