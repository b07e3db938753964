"""What one peer may ask per second: the buckets by themselves, and a session that is held back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trio
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from petals.models.client.local import LocalChain
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from petals.peer.client.hops.hop import StepInput
from petals.peer.engine.quotas import BURST_S, MAX_PEERS, Rates
from petals.peer.engine.stream_rules import LONG_PATIENCE_S
from petals.protocols.errors import PeerBusy
from petals.protocols.types import PeerId
from tests.fakes.memory_swarm import MemorySwarm, run_in_memory
from tests.models.tiny import CASES, save_tiny

ALICE, BOB = PeerId("alice"), PeerId("bob")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def rates(clock: Clock, tokens_s: float | None = 10.0, bytes_s: float | None = None) -> Rates:
    return Rates(tokens_s, bytes_s, frozenset({BOB}), clock)


@given(asked=st.lists(st.tuples(st.integers(1, 200), st.floats(0, 10)), max_size=30), patience=st.floats(0, 30))
def test_nobody_gets_more_than_the_burst_and_the_rate(asked: list[tuple[int, float]], patience: float) -> None:
    """However one asks: until any moment, what has been let through is what has flowed in, at most."""
    clock = Clock()
    buckets, starts, served = rates(clock), clock.now, 0.0
    last = clock.now
    for tokens, pause in asked:
        turn = buckets.take(ALICE, tokens=tokens, patience_s=patience)
        if turn.refused and turn.wait_s == 0:
            assert tokens > 10.0 * (BURST_S + patience)
            continue
        if turn.refused:
            clock.now += turn.wait_s + 1e-6  # come back when told to, and be let in
            turn = buckets.take(ALICE, tokens=tokens, patience_s=patience)
            assert not turn.refused
        assert 0 <= turn.wait_s <= patience
        at = clock.now + turn.wait_s
        assert at >= last - 1e-6, "first come, first served"
        last = at
        served += tokens
        assert served <= 10.0 * (BURST_S + at - starts) + 1e-3
        clock.now += pause


def test_each_peer_has_its_own_and_some_have_none() -> None:
    clock = Clock()
    buckets = rates(clock)
    assert buckets.take(ALICE, tokens=50, patience_s=0).wait_s == 0
    assert buckets.take(ALICE, tokens=1, patience_s=0).refused
    assert buckets.take(ALICE, tokens=10, patience_s=5).wait_s == pytest.approx(1)
    assert not buckets.take(PeerId("carol"), tokens=50, patience_s=0).refused
    assert not buckets.take(BOB, tokens=10**9, nbytes=10**12, patience_s=0).refused
    open_to_all = rates(clock, None)
    assert not open_to_all.take(ALICE, tokens=10**9, patience_s=0).refused


def test_bytes_are_paid_for_afterwards_too_and_given_back() -> None:
    clock = Clock()
    buckets = rates(clock, None, 100.0)
    buckets.charge(ALICE, nbytes=700)  # an answer, 200 over the burst
    assert buckets.take(ALICE, nbytes=100, patience_s=10).wait_s == pytest.approx(3)
    buckets.charge(ALICE, nbytes=-100)  # its asker went away
    assert buckets.take(ALICE, nbytes=100, patience_s=10).wait_s == pytest.approx(3)
    assert buckets.take(ALICE, tokens=10**9, patience_s=0).wait_s == 0
    clock.now += 1e6
    assert buckets.take(ALICE, nbytes=501, patience_s=0).refused, "nothing is saved up beyond the burst"


def test_who_has_all_its_burst_again_is_forgotten() -> None:
    clock = Clock()
    buckets = rates(clock)
    for index in range(MAX_PEERS):
        buckets.take(PeerId(f"peer-{index}"), tokens=1, patience_s=0)
    buckets.charge(ALICE, tokens=1000)
    clock.now += BURST_S
    buckets.take(PeerId("another"), tokens=1, patience_s=0)
    assert len(buckets._buckets) == 2
    assert buckets.take(ALICE, tokens=1, patience_s=0).refused, "a debt is not forgotten"


def test_a_session_over_its_rate_waits_for_its_turn(tmp_path: Path) -> None:
    """Two tokens a second: the burst of ten at once, every other one half a second after the one before. A prompt that
    would have to wait for longer than clients do is refused, and told when to come back."""
    save_tiny(next(case for case in CASES if case.id == "llama"), tmp_path)
    span = load_span(open_checkpoint(str(tmp_path)), range(4))
    hidden = torch.randn(1, 24, span.hidden_size, generator=torch.Generator().manual_seed(0))
    local = LocalChain([span]).open_session(batch_size=1, max_length=96)
    expected = [local.step(hidden[:, :8]), *(local.step(hidden[:, index : index + 1]) for index in range(8, 24))]

    async def scenario(swarm: MemorySwarm) -> None:
        swarm.add(span, rates=Rates(2.0, None, frozenset(), trio.current_time))
        session = await swarm.open_session(range(4), 1, 96)
        started = trio.current_time()
        assert_close(await session.step(hidden[:, :8]), expected[0])
        for index in range(8, 24):
            assert_close(await session.step(hidden[:, index : index + 1]), expected[index - 7])
        waited = trio.current_time() - started
        assert waited == pytest.approx((24 - 2 * BURST_S) / 2, rel=0.1)
        assert session.failures == 0
        with pytest.raises(PeerBusy, match="so much so fast") as refused:
            await session.hops[0].step(StepInput(position=0, hidden=hidden[:, :1].repeat(1, 88, 1)))
        assert refused.value.retry_after_s == pytest.approx(88 / 2 - LONG_PATIENCE_S, abs=1)
        await session.reset()

    run_in_memory(1, scenario)
