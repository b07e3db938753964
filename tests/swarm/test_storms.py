"""Storms: servers killed and frozen at random moments, and not a bit of any answer changes, not a byte stays leased.

Hundreds of schedules run in memory, under a clock that jumps, each from its seed; one storm runs over real hosts.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import trio
from torch.testing import assert_close

from petals.models.client.local import LocalChain
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from petals.peer.client.session.session import RemoteSession
from tests.fakes.memory_swarm import MemorySwarm, run_in_memory, storm
from tests.fakes.plain_blocks import make_plain
from tests.models.tiny import CASES, save_tiny
from tests.swarm.conftest import Swarm, Truth, all_leases_returned
from tests.swarm.test_processes import start

GROUPS, SCHEDULES = 40, 50
"""Every fourth group computes with Llama's blocks, whose arithmetic is a third of a schedule's time, the others with
plain ones: a session that is broken on purpose fails in the same schedules of both."""
BATCH, LENGTH = 2, 24

Turn = tuple[int, torch.Tensor, torch.Tensor | None]
"""(roll back to this position, hidden states, row order)"""


def some_turns(dice: random.Random, size: int) -> list[Turn]:
    """Prompts, tokens, roll-backs and reordered rows, as the dice say."""
    generator = torch.Generator().manual_seed(dice.randrange(1 << 30))
    turns: list[Turn] = []
    position = 0
    for index in range(12):
        tokens = dice.choice((1, 1, 1, 2, 5))
        if index and dice.random() < 0.15:
            position = dice.randrange(position + 1)
        if position + tokens > LENGTH:
            break
        order = torch.tensor([1, 0]) if index and dice.random() < 0.2 else None
        turns.append((position, torch.randn(BATCH, tokens, size, generator=generator), order))
        position += tokens
    return turns


def truth_of(chain: LocalChain, turns: list[Turn], piece_tokens: int = 0) -> list[torch.Tensor]:
    """At home, in the same pieces: those of long prompts flow through several servers (pipelined_step.py)."""
    session = chain.open_session(batch_size=BATCH, max_length=LENGTH)
    answers = []
    for position, hidden, order in turns:
        session.position = position
        piece = piece_tokens // BATCH
        pieces = hidden.split(piece, dim=1) if piece and hidden.shape[1] >= 2 * piece else (hidden,)
        outputs = [session.step(pieces[0], hypo_ids=order), *(session.step(each) for each in pieces[1:])]
        answers.append(torch.cat(outputs, dim=1))
    return answers


async def answers_of(session: RemoteSession, turns: list[Turn]) -> list[torch.Tensor]:
    answers = []
    for position, hidden, order in turns:
        session.rollback(position)
        answers.append(await session.step(hidden, hypo_ids=order))
    return answers


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalChain, LocalChain]:
    """Four blocks, loaded as the servers of the storm load them, 0:1, 1:3, 3:4: Llama's, and plain ones."""
    directory = tmp_path_factory.mktemp("storm")
    save_tiny(next(case for case in CASES if case.id == "llama"), directory)
    checkpoint = open_checkpoint(str(directory))
    llama, plain = ([load_span(checkpoint, blocks) for blocks in (range(1), range(1, 3), range(3, 4))] for _ in "12")
    return LocalChain(llama), LocalChain([make_plain(span) for span in plain])


async def weather(swarm: MemorySwarm, chain: LocalChain, log: list[float]) -> None:
    """One session through one storm, compared with the same blocks at home; `log` gets what happened when."""
    for span in chain._spans:
        for _ in range(2):
            swarm.add(span)
    await swarm.watcher.changed(1.0)
    turns = some_turns(swarm.dice, chain.hidden_size)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:

        async def blow() -> None:
            log.append(await storm(swarm, chain._spans, stop, mean_s=swarm.dice.choice((0.02, 0.1, 0.5))))

        nursery.start_soon(blow)
        standby = swarm.nursery if swarm.dice.random() < 0.3 else None
        push = swarm.dice.random() < 0.7
        piece_tokens = swarm.dice.choice((0, 2, 4))
        swarm.better_ways = swarm.dice.choice((0.0, 0.0, 0.1))
        session = await swarm.open_session(
            range(4), BATCH, LENGTH, push=push, standby_in=standby, piece_tokens=piece_tokens
        )
        got = await answers_of(session, turns)
        stop.set()
    await session.close()
    log += [session.failures, trio.current_time()]
    for index, (mine, wanted) in enumerate(zip(got, truth_of(chain, turns, piece_tokens), strict=True)):
        assert torch.equal(mine, wanted), f"step {index}"
    for server in swarm.servers.values():
        server.die()  # frozen ones have not heard that the session is over
    with trio.fail_after(5):
        while any(server.inbound.sessions for server in swarm.servers.values()):  # noqa: ASYNC110
            await trio.sleep(0.01)
    for server in swarm.servers.values():
        assert server.inbound.budget.left_bytes == server.inbound.budget.total_bytes
        assert not server.inbound._mailboxes


@pytest.mark.parametrize("group", range(GROUPS))
def test_schedules_in_memory(chains: tuple[LocalChain, LocalChain], group: int) -> None:
    chain, failures = chains[group % 4 > 0], 0.0
    for seed in range(group * SCHEDULES, (group + 1) * SCHEDULES):
        log: list[float] = []
        try:
            run_in_memory(seed, partial(weather, chain=chain, log=log))
        except BaseException as error:
            error.add_note(f"schedule {seed}")
            raise
        failures += log[1]
    assert failures > SCHEDULES  # the storms were storms


def test_a_schedule_happens_again_from_its_seed(chains: tuple[LocalChain, LocalChain]) -> None:
    for seed in range(5):
        logs: tuple[list[float], list[float]] = ([], [])
        for log in logs:
            run_in_memory(seed, partial(weather, chain=chains[seed % 2], log=log))
        assert logs[0] == logs[1]


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "together"])
async def test_a_storm_over_real_hosts(
    make_swarm: Callable[..., Swarm], tiny_truth: Truth, deterministic: bool
) -> None:
    """20 sessions, four at a time, while 200 connections and servers are cut at random; every answer is exact, to the
    last bit where nobody's step shares a pass."""
    tolerance = {"rtol": 0.0, "atol": 0.0} if deterministic else {"rtol": 1e-4, "atol": 1e-4}
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    spans = (range(2), range(2, 4))
    for blocks in spans * 3:
        await swarm.add(blocks, deterministic=deterministic)
    client = await bootstrap.client()
    await client.ready()
    local = LocalChain([load_span(tiny_truth.checkpoint, blocks, deterministic=deterministic) for blocks in spans])
    dice = random.Random(3)
    sessions: set[RemoteSession] = set()
    cuts = 0

    async def one(seed: int) -> None:
        turns = some_turns(random.Random(seed), local.hidden_size)
        session = await client.open_session(client.blocks, BATCH, LENGTH)
        sessions.add(session)
        for got, wanted in zip(await answers_of(session, turns), truth_of(local, turns), strict=True):
            assert_close(got, wanted, **tolerance)
        sessions.discard(session)
        await session.close()

    async def cut() -> None:
        """A server dies and another one comes, or the ground goes from under one hop."""
        nonlocal cuts
        cuts += 1
        if dice.random() < 0.05:
            victim = dice.choice(swarm.peers[1:])
            assert victim.server is not None
            blocks = victim.server.span.blocks
            if sum(p.server is not None and p.server.span.blocks == blocks for p in swarm.peers) > 1:
                await swarm.stop(victim)
                await swarm.add(blocks, deterministic=deterministic)
        elif hops := [hop for session in sessions for hop in session.hops]:
            await dice.choice(hops).messages.reset()

    async def worker(seeds: Iterator[int]) -> None:
        for seed in seeds:
            await one(seed)

    with trio.fail_after(240):
        seeds = iter(range(1000))
        twenty = iter([next(seeds) for _ in range(20)])
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(worker, twenty)
            for _ in range(200):
                await cut()
                await trio.lowlevel.checkpoint()
    assert cuts == 200
    for peer in swarm.peers:
        if peer.server is not None:
            await all_leases_returned(peer)
            assert not peer.server.inbound._mailboxes


@pytest.mark.swarm
async def test_a_storm_of_killed_processes(
    make_swarm: Callable[..., Swarm], tmp_path: Path, nursery: trio.Nursery
) -> None:
    """Real processes killed at random, others started in their place, sessions all the while. $STORM_KILLS says how
    many; with 200 it takes a quarter of an hour, most of it to start servers."""
    save_tiny(next(case for case in CASES if case.id == "llama"), tmp_path)
    kills = int(os.environ.get("STORM_KILLS", "4"))
    client_peer = await make_swarm(tmp_path).add()
    spans = {"0:2": range(2), "2:4": range(2, 4)}
    checkpoint = open_checkpoint(str(tmp_path))
    local = LocalChain([load_span(checkpoint, blocks, deterministic=True) for blocks in spans.values()])
    alive: dict[str, list[trio.Process]] = {name: [] for name in spans}
    dice = random.Random(11)
    answered = killed = 0
    over = trio.Event()

    async def serve(name: str) -> None:
        words = (
            str(tmp_path),
            "--serve",
            name,
            "--cache_mb",
            "64",
            "--deterministic",
            "--initial_peers",
            *client_peer.addrs,
        )
        alive[name].append((await start(nursery, *words))[0])

    async with trio.open_nursery() as starting:
        for name in [*spans, *spans, *spans]:
            starting.start_soon(serve, name)
    client = await client_peer.client()
    await client.ready()

    async def kill(name: str) -> None:
        nonlocal killed
        while killed < kills:
            killed += 1
            victim = alive[name].pop(dice.randrange(len(alive[name])))
            victim.kill()
            await victim.wait()
            await serve(name)

    async def ask(seeds: Iterator[int]) -> None:
        nonlocal answered
        for seed in seeds:
            if over.is_set() and answered >= 20:
                return
            turns = some_turns(random.Random(seed), local.hidden_size)
            session = await client.open_session(client.blocks, BATCH, LENGTH)
            for got, wanted in zip(await answers_of(session, turns), truth_of(local, turns), strict=True):
                assert torch.equal(got, wanted), f"session {seed}"
            await session.close()
            answered += 1

    seeds = iter(range(1_000_000))
    async with trio.open_nursery() as asking:
        for _ in range(3):
            asking.start_soon(ask, seeds)
        async with trio.open_nursery() as killing:
            for name in spans:
                killing.start_soon(kill, name)
        over.set()
    assert killed == kills
    for processes in alive.values():
        for process in processes:
            process.kill()
