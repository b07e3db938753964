"""The library's own cache beside ours: whatever is done to both in whatever order, both go on alike."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.generation import ChainCache
from petals.models.client.local import LocalChain
from petals.models.library_contract import DEFAULT_CACHE_NAME
from tests.models.conftest import Tiny
from tests.models.tiny import VOCABULARY

ROOM, BATCH = 32, 2

Deed = tuple[str, int]
deeds = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("crop"), st.integers(-5, 0)),
        st.tuples(st.just("reorder"), st.integers(0, BATCH**BATCH - 1)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=10,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deeds=deeds, seed=st.integers(0, 1000))
def test_whatever_is_done_to_both(llama: Tiny, deeds: list[Deed], seed: int) -> None:
    whole, model = llama.reference.fresh(), load_causal_lm(llama.checkpoint, LocalChain(llama.parts))
    generator = torch.Generator().manual_seed(seed)
    theirs = DynamicCache(config=whole.config)
    with torch.no_grad(), ChainCache(model.blocks.chain, ROOM).closing() as ours:
        for deed, number in [("step", 3), *deeds, ("step", 1)]:
            held = theirs.get_seq_length()
            if deed == "step" and held + number <= ROOM:
                ids = torch.randint(2, VOCABULARY, (BATCH, number), generator=generator)
                expected, got = (
                    each(ids, use_cache=True, **{DEFAULT_CACHE_NAME: cache}).logits
                    for each, cache in ((whole, theirs), (model, ours))
                )
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)
            elif deed == "crop" and held + number > 0:  # the library never drops everything
                for cache in (theirs, ours):
                    cache.crop(number)
            elif deed == "reorder":
                rows = torch.tensor([number % BATCH, number // BATCH])
                for cache in (theirs, ours):
                    cache.reorder_cache(rows)
            elif deed == "reset":
                theirs = DynamicCache(config=whole.config)  # its own keeps zeros in place of what it forgets
                ours.reset()
            assert ours.get_seq_length() == theirs.get_seq_length()
            assert ours.get_mask_sizes(2, 0) == theirs.get_mask_sizes(2, 0)
