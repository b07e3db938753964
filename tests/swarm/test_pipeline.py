"""Long prompts flow through the servers in pieces: all compute at the same time, and a lost one costs no number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import trio

from petals.models.client.local import LocalChain
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from petals.peer.client.session.pipelined_step import PIECE_TOKENS
from petals.peer.engine.scheduler import Timed
from tests.fakes.memory_swarm import MemorySwarm, run_in_memory
from tests.models.tiny import CASES, save_tiny
from tests.swarm.conftest import Swarm, Truth, all_leases_returned
from tests.tolerance import assert_rounded

MakeSwarm = Callable[..., Swarm]
COMPUTE_S = 1.0


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> LocalChain:
    directory = tmp_path_factory.mktemp("pipeline")
    save_tiny(next(case for case in CASES if case.id == "llama"), directory)
    checkpoint = open_checkpoint(str(directory))
    return LocalChain([load_span(checkpoint, range(block, block + 1)) for block in range(4)])


class _SlowLane:
    """One job at a time, each for `COMPUTE_S` of the clock that jumps."""

    frozen = False

    def __init__(self) -> None:
        self._thread = trio.Lock()

    def piece_rows(self, visitor: object, most: int) -> int:
        return most

    async def submit(self, priority: object, work: Callable[[], Any], **_: Any) -> Timed[Any]:
        async with self._thread:
            await trio.sleep(COMPUTE_S)
            return Timed(work(), 0.0, COMPUTE_S)


@pytest.mark.parametrize(("piece_tokens", "passes"), [(8, 8 + 3), (0, 4)])
def test_all_servers_compute_at_the_same_time(chain: LocalChain, piece_tokens: int, passes: int) -> None:
    """8 pieces through 4 servers take 11 times as long as one piece through one server, not 32 times."""
    hidden = torch.randn(1, 64, chain.hidden_size, generator=torch.Generator().manual_seed(0))
    took: list[float] = []

    async def scenario(swarm: MemorySwarm) -> None:
        for span in chain._spans:
            server = swarm.add(span)
            server.inbound.lane = _SlowLane()  # type: ignore[assignment]
        await swarm.watcher.changed(1.0)
        session = await swarm.open_session(range(4), 1, 80, piece_tokens=piece_tokens, push=False)
        began = trio.current_time()
        output = await session.step(hidden)
        took.append(trio.current_time() - began)
        assert [trace.compute_s for trace in session.last_trace] == [
            COMPUTE_S * max(1, passes - 3)
        ] * 4 or not piece_tokens
        await session.close()
        with chain.open_session(batch_size=1, max_length=80) as local:
            pieces = hidden.split(piece_tokens or 64, dim=1)
            assert torch.equal(output, torch.cat([local.step(piece) for piece in pieces], dim=1))

    run_in_memory(0, scenario)
    assert took[0] == pytest.approx(COMPUTE_S * passes)


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_a_server_lost_in_the_middle_of_a_prompt(make_swarm: MakeSwarm, tiny_truth: Truth, lost: int) -> None:
    swarm = make_swarm(str(tiny_truth.directory))
    spans = (range(1), range(1, 3), range(3, 4))
    for blocks in spans * 2:
        await swarm.add(blocks)
    peer = await swarm.add()
    client = await peer.client()
    await client.ready()
    tokens = 6 * PIECE_TOKENS + 5
    hidden = torch.randn(1, tokens, client.checkpoint.hidden_size, generator=torch.Generator().manual_seed(1)) * 0.1
    session = await client.open_session(range(4), 1, tokens + 4)
    victim = session.hops[lost]
    remember = victim.remember

    def cut_after_two(*args: Any) -> None:
        remember(*args)
        if len(victim.history) == 2:
            swarm.nursery.start_soon(victim.messages.reset)

    victim.remember = cut_after_two  # type: ignore[method-assign]
    output = await session.step(hidden)
    assert session.failures >= 1
    assert sum(step.hidden.shape[1] for step in session.hops[lost].history) == tokens
    local = LocalChain([load_span(tiny_truth.checkpoint, blocks) for blocks in spans])
    with local.open_session(batch_size=1, max_length=tokens + 4) as truth:
        whole = torch.cat([truth.step(piece) for piece in hidden.split(PIECE_TOKENS, dim=1)], dim=1)
        assert_rounded(output, whole)
        again = torch.randn(1, 1, client.checkpoint.hidden_size, generator=torch.Generator().manual_seed(2)) * 0.1
        assert_rounded(await session.step(again), truth.step(again))
    await session.close()
    for server in swarm.peers[:-1]:
        await all_leases_returned(server)


async def test_nobody_left_is_an_error_with_the_blocks_in_it(make_swarm: MakeSwarm, tiny_truth: Truth) -> None:
    from petals.protocols.errors import MissingBlocks, RemoteError

    swarm = make_swarm(str(tiny_truth.directory))
    await swarm.add(range(2))
    last = await swarm.add(range(2, 4))
    peer = await swarm.add()
    client = await peer.client()
    await client.ready()
    hidden = torch.randn(1, 4 * PIECE_TOKENS, client.checkpoint.hidden_size)
    session = await client.open_session(range(4), 1, 4 * PIECE_TOKENS)
    await swarm.stop(last)
    with pytest.raises((MissingBlocks, RemoteError)):
        await session.step(hidden)
    await session.reset()
