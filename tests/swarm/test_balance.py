"""A swarm that lost its balance finds it again: servers that chose their blocks move, and nobody loses a token."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from petals.dht.records import ServerRecord, ServerState
from petals.models.blocks.block import BlockSpan
from petals.models.client.causal_lm import load_causal_lm
from petals.models.errors import ModelError
from petals.models.source.checkpoint import Checkpoint
from petals.peer.base.config import ServeConfig
from petals.peer.node import Peer
from petals.peer.server import service
from petals.peer.server.capacity import capacity_of
from petals.peer.server.memory import free_host_bytes
from petals.protocols.errors import UserError
from petals.protocols.types import ModelId
from tests.swarm.conftest import Swarm, Truth

MakeSwarm = Callable[..., Swarm]
OFTEN = {"mean_balance_check_period": 0.2, "announce_s": 1.0}
IDS = torch.tensor([[5, 17, 99, 3]])


async def until(peer: Peer, what: Callable[[tuple[ServerRecord, ...]], bool]) -> None:
    """Wait until a lookup shows it; the deadline is the test's own."""
    client = await peer.client()
    with trio.fail_after(30):
        while not what(await peer.directory.lookup(client.model)):
            await client.watcher.changed(0.1)


def online(records: tuple[ServerRecord, ...], blocks: range) -> int:
    return sum(r.state is ServerState.ONLINE and r.blocks == blocks for r in records)


async def test_a_hole_is_filled_by_who_is_not_needed_where_it_is(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    first, second, third = [await swarm.add(num_blocks=2, **OFTEN) for _ in range(3)]
    held = [peer.server.span.blocks for peer in (first, second, third) if peer.server is not None]
    assert held[:2] == [range(2), range(2, 4)]
    alone = second if held[2] == range(2) else first
    lost = range(2, 4) if alone is second else range(2)
    await swarm.stop(alone)
    await until(bootstrap, lambda records: online(records, lost) == 1 and len(records) == 2)
    client = await bootstrap.client()
    await client.ready()
    model = load_causal_lm(tiny_truth.checkpoint, client.chain())
    said = await client.portal.run_sync(partial(model.generate, IDS, max_new_tokens=8, do_sample=False))
    assert torch.equal(said, tiny_truth.model.generate(IDS, max_new_tokens=8, do_sample=False))


async def test_a_session_goes_on_while_its_server_moves(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    await swarm.add(range(2), throughput=10.0)  # nobody's choice while the mover is there
    other_half = await swarm.add(range(2, 4))
    mover = await swarm.add(num_blocks=2, drain_s=0.2, throughput=1000.0, **OFTEN)
    assert mover.server is not None
    assert mover.server.span.blocks == range(2)
    client = await bootstrap.client()
    await client.ready()
    model = load_causal_lm(tiny_truth.checkpoint, client.chain())
    expected = tiny_truth.model.generate(IDS, max_new_tokens=12, do_sample=False)
    session = model.inference_session(max_length=16)
    generate = partial(model.generate, session=session, max_new_tokens=6, do_sample=False)
    parts = [await client.portal.run_sync(partial(generate, IDS))]
    hops = session.cache.session.remote.hops
    assert (hops[0].peer_id, hops[-1].peer_id) == (mover.peer_id, other_half.peer_id)
    await swarm.stop(other_half)
    parts.append(await client.portal.run_sync(generate))
    assert torch.equal(torch.cat(parts, dim=1), expected)
    hops = session.cache.session.remote.hops
    assert (hops[0].peer_id, hops[-1].peer_id) == (swarm.peers[1].peer_id, mover.peer_id)
    await client.portal.run_sync(session.close)


async def test_two_that_could_go_do_not_go_both(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    """Both hold what only they hold; the hole is filled, and none is torn."""
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    fixed = await swarm.add(range(2, 4), throughput=1000.0)
    twins = [await swarm.add(num_blocks=2, **OFTEN) for _ in range(2)]
    assert [twin.server.span.blocks for twin in twins if twin.server is not None] == [range(2), range(2)]
    await swarm.stop(fixed)
    await until(bootstrap, lambda records: online(records, range(2)) == online(records, range(2, 4)) == 1)


async def always_whole(observer: Peer, model: ModelId) -> None:
    """Look around without pause; every look must find every block with somebody who stays, or who drains: several may
    do so at once, and those who then find that nobody stays go back to where they were."""
    here = (ServerState.ONLINE, ServerState.DRAINING)
    while True:
        records = await observer.directory.lookup(model)
        held = {block for record in records if record.state in here for block in record.blocks}
        assert held == set(range(4)), records


async def test_a_lopsided_swarm_heals_and_is_whole_all_the_time(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    strong = await swarm.add(range(2, 4), throughput=800.0)
    movers = [await swarm.add(num_blocks=2, **OFTEN) for _ in range(3)]
    assert [mover.server.span.blocks for mover in movers if mover.server is not None] == [range(2)] * 3
    await swarm.add(range(2, 4), throughput=10.0)
    model = (await bootstrap.client()).model
    async with trio.open_nursery() as nursery:
        nursery.start_soon(always_whole, bootstrap, model)
        await swarm.stop(strong)
        await until(bootstrap, lambda records: online(records, range(2)) == online(records, range(2, 4)) == 2)
        nursery.cancel_scope.cancel()


async def test_who_loads_says_so_and_is_not_asked_yet(
    make_swarm: MakeSwarm, tiny_truth: Truth, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow_load(*args: Any, load: Callable[..., BlockSpan] = service.load_span, **settings: Any) -> BlockSpan:
        assert go_on.wait(30)
        return load(*args, **settings)

    monkeypatch.setattr(service, "load_span", slow_load)
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    client = await bootstrap.client()
    nursery.start_soon(partial(swarm.add, num_blocks=2))
    await until(bootstrap, lambda records: [(r.state, r.blocks) for r in records] == [(ServerState.JOINING, range(2))])
    assert client.watcher.view.offers == ()
    nursery.start_soon(partial(swarm.add, num_blocks=2))
    # The second takes what nobody is loading.
    await until(bootstrap, lambda records: {record.blocks for record in records} == {range(2), range(2, 4)})
    go_on.set()
    await client.ready()


async def test_a_place_that_can_not_be_loaded_is_given_up(
    make_swarm: MakeSwarm, tiny_truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    strong = await swarm.add(range(2, 4), throughput=800.0)
    await swarm.add(range(2))
    mover = await swarm.add(num_blocks=2, **OFTEN)
    await swarm.add(range(2, 4), throughput=10.0)
    load, failed = service.load_span, list[range]()

    def refuse(checkpoint: Checkpoint, blocks: range, **settings: Any) -> BlockSpan:
        if blocks == range(2, 4) and not failed:
            failed.append(blocks)
            raise ModelError("no room on the disk")
        return load(checkpoint, blocks, **settings)

    monkeypatch.setattr(service, "load_span", refuse)
    await swarm.stop(strong)
    await until(bootstrap, lambda records: bool(failed) and online(records, range(2, 4)) == 2)
    assert mover.server is not None


async def test_records_tell_the_way_to_who_comes_next(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    swarm = make_swarm(tiny_truth.directory)
    bootstrap = await swarm.add()
    first = await swarm.add(range(2), announce_s=0.5)
    second = await swarm.add(range(2, 4), announce_s=0.5)

    def knows(records: tuple[ServerRecord, ...]) -> bool:
        record = next(r for r in records if r.peer_id == first.peer_id)
        return 0 < record.round_trips_s.get(second.peer_id, 0.0) < 2.0

    await until(bootstrap, knows)


def test_how_many_blocks_fit(tiny_truth: Truth, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def free(nbytes: int) -> Any:
        return type("Memory", (), {"available": nbytes})

    config = ServeConfig(cache_bytes=1 << 20)
    monkeypatch.setattr("petals.peer.server.memory.psutil.virtual_memory", lambda: free(1 << 40))
    count, why = capacity_of(tiny_truth.checkpoint, config)
    assert count == 4
    assert why.endswith("so 4 of 4 blocks")
    (tmp_path / "memory.max").write_text("1048576\n")
    (tmp_path / "memory.current").write_text("1048000\n")
    (tmp_path / "memory.stat").write_text("anon 4096\ninactive_file 1000000\n")
    monkeypatch.setattr("petals.peer.server.memory.CONTROL_GROUP", tmp_path)
    with pytest.raises(UserError, match="not one fits; lower --cache_mb"):
        capacity_of(tiny_truth.checkpoint, config)
    assert free_host_bytes() == 1048576 - 48000, "files that were read give way"
