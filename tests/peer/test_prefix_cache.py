"""What a server keeps: found by name, given up for any lease, the greediest first, forgotten after a while."""

from __future__ import annotations

import pytest
import torch
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from petals.models.blocks.cache import LayerShape, SpanCache
from petals.models.errors import StepError
from petals.peer.engine.cache_budget import CacheBudget, NoRoom
from petals.peer.engine.prefix_cache import PrefixStore
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import ProtocolViolation
from petals.protocols.inference import Conversation
from petals.protocols.prefixes import MAX_PREFIXES, PREFIX_TOKENS, prefix_names
from petals.protocols.types import PeerId

ALICE, BOB = PeerId("alice"), PeerId("bob")
SHAPE = LayerShape(1, 4, 1, 4, torch.float32)
BLOCKS = range(2, 4)
CHUNK_BYTES = 2 * 8 * 4 * PREFIX_TOKENS


def a_cache(chunks: int, fill: float = 1.0) -> SpanCache:
    cache = SpanCache(BLOCKS, [SHAPE, SHAPE], 1, chunks * PREFIX_TOKENS, torch.device("cpu"))
    with torch.inference_mode():
        for block in BLOCKS:
            layer = cache.layer(block)
            assert layer.pair is not None
            layer.pair.fill_(fill)
    cache.truncate(chunks * PREFIX_TOKENS)
    return cache


async def leave(store: PrefixStore, budget: CacheBudget, who: PeerId, ids: list[int]) -> SpanCache:
    names = prefix_names(ids)
    cache = a_cache(len(names))
    with await budget.acquire(who, cache.nbytes + 100, 0) as lease:
        store.add(store.owner(who, BLOCKS, ""), cache, names, lease)
    return cache


def tokens(chunks: int, seed: int = 0) -> list[int]:
    return [(seed * 1000 + place) % 50257 for place in range(chunks * PREFIX_TOKENS)]


async def test_the_longest_kept_beginning_is_found() -> None:
    budget = CacheBudget(100 * CHUNK_BYTES)
    store = PrefixStore(budget, idle_s=60, shared=False)
    cache = await leave(store, budget, ALICE, tokens(3))
    owner = store.owner(ALICE, BLOCKS, "")
    assert store.find(owner, prefix_names(tokens(5)), 1000) == (cache, 3 * PREFIX_TOKENS)
    assert store.find(owner, prefix_names(tokens(2)), 1000) == (cache, 2 * PREFIX_TOKENS)
    assert store.find(owner, prefix_names(tokens(5)), 2 * PREFIX_TOKENS + 1) == (cache, 2 * PREFIX_TOKENS)
    assert store.find(owner, prefix_names(tokens(3, seed=7)), 1000) is None
    assert store.find(store.owner(BOB, BLOCKS, ""), prefix_names(tokens(3)), 1000) is None
    assert store.find(store.owner(ALICE, range(2, 3), ""), prefix_names(tokens(3)), 1000) is None
    assert store.find(store.owner(ALICE, BLOCKS, "polite"), prefix_names(tokens(3)), 1000) is None


async def test_a_longer_one_takes_the_place_of_its_beginning() -> None:
    budget = CacheBudget(100 * CHUNK_BYTES)
    store = PrefixStore(budget, idle_s=60, shared=False)
    await leave(store, budget, ALICE, tokens(2))
    longer = await leave(store, budget, ALICE, tokens(4))
    assert budget.kept_bytes == longer.nbytes
    assert store.find(store.owner(ALICE, BLOCKS, ""), prefix_names(tokens(2)), 1000) == (longer, 2 * PREFIX_TOKENS)


async def test_what_is_kept_gives_way_to_leases_the_greediest_first() -> None:
    budget = CacheBudget(8 * CHUNK_BYTES)
    store = PrefixStore(budget, idle_s=60, shared=False)
    await leave(store, budget, BOB, tokens(1, seed=1))
    await leave(store, budget, ALICE, tokens(2, seed=2))
    await leave(store, budget, ALICE, tokens(3, seed=3))
    assert budget.left_bytes == budget.total_bytes
    assert budget.kept_bytes == 6 * CHUNK_BYTES
    with await budget.acquire(BOB, 3 * CHUNK_BYTES, 0):
        assert store.find(store.owner(ALICE, BLOCKS, ""), prefix_names(tokens(2, seed=2)), 1000) is None
        assert store.find(store.owner(BOB, BLOCKS, ""), prefix_names(tokens(1, seed=1)), 1000) is not None
        with await budget.acquire(BOB, 5 * CHUNK_BYTES, 0):
            assert budget.kept_bytes == 0
            with pytest.raises(NoRoom):
                await budget.acquire(BOB, 1, 0)
    assert budget.left_bytes == budget.total_bytes


async def test_what_nobody_asks_for_is_forgotten(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    budget = CacheBudget(100 * CHUNK_BYTES)
    store = PrefixStore(budget, idle_s=60, shared=True)
    nursery.start_soon(store.run)
    await leave(store, budget, ALICE, tokens(2))
    await trio.sleep(50)
    assert store.find(store.owner(BOB, BLOCKS, ""), prefix_names(tokens(2)), 1000) is not None
    await trio.sleep(50)
    assert budget.kept_bytes
    await trio.sleep(50)
    assert not budget.kept_bytes


@given(st.lists(st.tuples(st.sampled_from([ALICE, BOB]), st.integers(1, 5), st.integers(0, 3)), max_size=20))
def test_no_byte_is_lost_or_made_up(left: list[tuple[PeerId, int, int]]) -> None:
    async def run() -> None:
        budget = CacheBudget(9 * CHUNK_BYTES)
        store = PrefixStore(budget, idle_s=60, shared=False)
        for who, chunks, seed in left:
            await leave(store, budget, who, tokens(chunks, seed))
            assert 0 <= budget.kept_bytes <= budget.left_bytes == budget.total_bytes
        with await budget.acquire(ALICE, budget.total_bytes, 0):
            assert budget.kept_bytes == budget.left_bytes == 0

    trio.run(run)


def test_names_are_shared_as_far_as_tokens_are() -> None:
    one, other = tokens(4), tokens(4)
    other[2 * PREFIX_TOKENS + 5] += 1
    names, others = prefix_names(one), prefix_names(other)
    assert names[:2] == others[:2]
    assert not set(names[2:]) & set(others[2:])
    assert prefix_names(one[:-1]) == names[:3]
    assert prefix_names([]) == []
    assert len(prefix_names([1] * (MAX_PREFIXES + 3) * PREFIX_TOKENS)) == MAX_PREFIXES


def test_a_cache_copies_only_what_there_is() -> None:
    one, two = a_cache(2, fill=3.0), a_cache(4, fill=0.0)
    two.copy_from(one, PREFIX_TOKENS)
    assert two.position == PREFIX_TOKENS
    pair = two.layer(3).pair
    assert pair is not None
    assert bool((pair[..., :PREFIX_TOKENS, :] == 3).all())
    assert bool((pair[..., PREFIX_TOKENS:, :] == 0).all())
    with pytest.raises(StepError):
        two.copy_from(one, 3 * PREFIX_TOKENS)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [(0, PREFIX_TOKENS), (2, 3 * PREFIX_TOKENS), (2, PREFIX_TOKENS - 1), (200, 100 * PREFIX_TOKENS)],
)
def test_a_server_that_answers_with_what_was_not_asked_is_caught(asked: int, answered: int) -> None:
    conversation = Conversation()
    names = prefix_names(tokens(asked))
    opening = pb.Open(
        session_id=bytes(16), model_digest="ab" * 32, end_block=4, batch_size=1, max_length=100, prefixes=names
    )
    conversation.request(pb.InferenceRequest(open=opening))
    with pytest.raises(ProtocolViolation):
        conversation.reply(pb.InferenceReply(opened=pb.Opened(prefix_tokens=answered)))


@pytest.mark.parametrize("names", [[b"short"], [bytes(32)] * (MAX_PREFIXES + 1)])
def test_names_have_their_size_and_number(names: list[bytes]) -> None:
    conversation = Conversation()
    opening = pb.Open(
        session_id=bytes(16), model_digest="ab" * 32, end_block=4, batch_size=1, max_length=100, prefixes=names
    )
    with pytest.raises(ProtocolViolation):
        conversation.request(pb.InferenceRequest(open=opening))
