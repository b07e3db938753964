"""What we rely on inside `transformers` (library_contract.py): the installed version calls it, and means the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from petals.models.blocks import cache as block_cache
from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.generation import ChainCache, _ChainLayer
from petals.models.client.local import LocalChain
from petals.models.library_contract import CONTRACT, CROP_KEEPS, DEFAULT_CACHE_NAME, cache_name, pop_cache
from tests.models.conftest import Tiny
from tests.models.tiny import VOCABULARY


def some_ids(batch: int = 1, length: int = 9) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the library asked our caches."""
    counted: Counter[str] = Counter()

    def spy(owner: type, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    spy(ChainCache, "get_seq_length")
    spy(_ChainLayer, "get_mask_sizes")
    spy(ChainCache, "reorder_cache")
    spy(ChainCache, "crop")
    spy(block_cache._BlockCache, "update")
    return counted


def test_generation_asks_the_cache_for_its_length_and_masks(llama: Tiny, calls: Counter[str]) -> None:
    model = load_causal_lm(llama.checkpoint, LocalChain(llama.whole))
    calls.clear()
    with llama.whole.library_path():
        model.generate(some_ids(), max_new_tokens=4)
    assert calls["get_seq_length"] >= 4
    assert calls["get_mask_sizes"] >= 1
    assert calls["update"] == 4 * len(llama.whole.blocks)


def test_beams_reorder_and_drafts_crop(llama: Tiny, calls: Counter[str]) -> None:
    model = load_causal_lm(llama.checkpoint, LocalChain(llama.parts))
    model.generate(some_ids(), max_new_tokens=6, num_beams=3)
    assert calls["reorder_cache"] >= 5
    model.generate(some_ids(), max_new_tokens=6, prompt_lookup_num_tokens=3)
    assert calls["crop"] >= 1


@pytest.mark.parametrize("drafts", ["the model's own", "another model's", "looked up"])
@pytest.mark.parametrize("new", [1, 2, 7, 20])
def test_assisted_decoding_says_what_the_library_says(llama: Tiny, drafts: str, new: int) -> None:
    """With drafts that are all right the library drops nothing (`crop(-0)`), with others some or all."""
    whole = llama.reference.fresh()
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": new}
    expected = whole.generate(some_ids(), **settings)
    if drafts == "looked up":
        settings["prompt_lookup_num_tokens"] = 3
    else:
        small = LlamaForCausalLM(whole.config).eval()
        small.load_state_dict(whole.state_dict())
        if drafts == "another model's":
            small.model.layers = small.model.layers[:2]
        settings["assistant_model"] = small
    model = load_causal_lm(llama.checkpoint, LocalChain(llama.parts))
    assert torch.equal(model.generate(some_ids(), **settings), expected)
    repeated = some_ids().repeat(1, 3)
    assert torch.equal(
        model.generate(repeated, **settings), whole.generate(repeated, do_sample=False, max_new_tokens=new)
    )


@pytest.mark.parametrize("count", [0, -1, -4, 3])
def test_crop_means_what_it_means_to_the_library(llama: Tiny, count: int) -> None:
    """The library's own cache beside ours, after the same calls."""
    if count > 0 and not CROP_KEEPS:
        pytest.skip("the installed version takes no positive number")
    whole, model = llama.reference.fresh(), load_causal_lm(llama.checkpoint, LocalChain(llama.parts))
    theirs = DynamicCache(config=whole.config)
    with torch.no_grad(), ChainCache(model.blocks.chain, 20).closing() as ours:
        for each, cache in ((whole, theirs), (model, ours)):
            each(some_ids(), use_cache=True, **{DEFAULT_CACHE_NAME: cache})
            cache.crop(count)
        assert ours.get_seq_length() == theirs.get_seq_length()
        last = some_ids()[:, -2:]
        one, other = (
            each(last, use_cache=True, **{DEFAULT_CACHE_NAME: cache}).logits
            for each, cache in ((whole, theirs), (model, ours))
        )
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4)


def test_the_cache_goes_by_the_name_of_the_installed_version() -> None:
    assert cache_name(LlamaForCausalLM.forward) == DEFAULT_CACHE_NAME
    cache = object()
    for name in ("cache", "past_key_values"):
        arguments: dict[str, Any] = {name: cache, "use_cache": True}
        assert pop_cache(arguments) is cache
        assert arguments == {"use_cache": True}
    assert len({reliance.name for reliance in CONTRACT}) == len(CONTRACT)
