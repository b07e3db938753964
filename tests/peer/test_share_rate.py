"""How fast weights are passed on: the arithmetic, under a clock of the test's own."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from petals.models.source.checkpoint import Checkpoint, open_checkpoint
from petals.peer.base.config import ServeConfig
from petals.peer.base.token_bucket import TokenBucket
from petals.peer.engine.stream_rules import Refused
from petals.peer.weights.fetch import SENDERS, Report, choose_senders
from petals.peer.weights.share import MAX_WAIT_S, WeightSender
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import UserError
from petals.protocols.types import PeerId
from tests.dht.conftest import make_record
from tests.models.tiny import CASES, save_tiny


@pytest.fixture
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(CASES[0], directory)
    return open_checkpoint(directory)


@given(
    takes=st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 10)), min_size=1, max_size=50),
    rate=st.floats(1, 1000),
    burst=st.floats(1, 1000),
)
def test_no_stretch_of_time_sees_more_than_its_share(takes: list[tuple[int, float]], rate: float, burst: float) -> None:
    bucket, now, sent = TokenBucket(rate, burst), 0.0, []
    for nbytes, pause in takes:
        now += pause
        expected = bucket.delay(nbytes, now)
        assert bucket.take(nbytes, now) == expected >= 0
        sent.append((now + expected, nbytes))
    times = [at for at, _ in sent]
    assert times == sorted(times), "first come, first served"
    for start in range(len(sent)):
        for end in range(start, len(sent)):
            seconds = sent[end][0] - sent[start][0]
            # What was taken last of a full bucket may go before it is filled again.
            assert sum(nbytes for _, nbytes in sent[start + 1 : end + 1]) <= rate * seconds + burst + 1e-6 * rate + 1e-6


def test_after_a_rest_the_burst_is_back_and_no_more() -> None:
    bucket = TokenBucket(rate=10, burst=20)
    assert [bucket.take(10, 0.0) for _ in range(4)] == [0, 0, 1, 2]
    assert bucket.delay(10, 100.0) == 0
    assert [bucket.take(10, 100.0) for _ in range(3)] == [0, 0, 1]


async def test_a_sender_keeps_to_its_rate_and_says_busy_to_the_rest(
    autojump_clock: MockClock, checkpoint: Checkpoint
) -> None:
    sender = WeightSender(checkpoint, ServeConfig(max_share_bytes_s=2 << 20), lambda _: True)
    started = trio.current_time()
    for _ in range(8):
        await sender._wait(1 << 20)
    assert trio.current_time() - started == pytest.approx(3)  # two of eight are the burst
    refused: list[Refused] = []

    async def one() -> None:
        try:
            await sender._wait(1 << 20)
        except Refused as refusal:
            refused.append(refusal)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(one)
    assert len(refused) == 20 - 2 * MAX_WAIT_S
    assert all(each.code == pb.BUSY and each.retry_after_s >= 1 for each in refused)


def test_settings_that_can_not_be() -> None:
    with pytest.raises(UserError, match="max_share_bytes_s is 0; allowed"):
        ServeConfig(max_share_bytes_s=0)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=40), st.integers(0, 30), st.integers(1, 12))
def test_every_block_that_somebody_serves_is_asked_of_somebody(
    spans: list[tuple[int, int]], start: int, length: int
) -> None:
    records = [make_record(PeerId(f"p{i}"), blocks=range(a, a + n)) for i, (a, n) in enumerate(spans)]
    wanted = range(start, start + length)
    chosen = choose_senders(records, wanted)
    served = {block for record in records for block in record.blocks} & set(wanted)
    assert {block for record in chosen for block in record.blocks} >= served
    assert len(chosen) >= min(SENDERS, len(records))
    assert len({record.peer_id for record in chosen}) == len(chosen) <= max(SENDERS, length)


def test_progress_in_words() -> None:
    report = Report("block 3 of tiny", 2_000_000, 12_000_000)
    assert report.first_line(2) == "fetching block 3 of tiny from 2 peers: 12.0 MB, 2 MB of it are here"
    report.start(100.0)
    assert report.line(101.0).endswith("2 of 12 MB, 0.0 MB/s, waiting")
    report.done = 7_000_000
    assert report.line(102.0) == "block 3 of tiny: 7 of 12 MB, 2.5 MB/s, 2 s left"
    report.done = 12_000_000
    assert report.last_line(104.0) == "fetched block 3 of tiny: 10.0 MB at 2.5 MB/s"
