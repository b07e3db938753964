"""A span refuses what does not fit, and is afterwards as if nothing had been asked."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from petals.models.blocks.block import BlockSpan
from petals.models.blocks.cache import SpanCache
from petals.models.blocks.states import MASK_BYTES, SNAPSHOTS
from petals.models.errors import BlockRangeError, CacheFull, StepError, UnsupportedModel
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from tests.models.conftest import Tiny, load_stock
from tests.models.tiny import BLOCKS, HIDDEN, VOCABULARY, Case, make_model
from tests.tolerance import assert_rounded


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "two dimensions": ({"hidden": noise(2, HIDDEN)}, r"\(batch, tokens, 32\)"),
    "other size": ({"hidden": noise(2, 3, 31)}, r"\(batch, tokens, 32\)"),
    "no tokens": ({"hidden": noise(2, 0, HIDDEN)}, "got"),
    "integers": ({"hidden": torch.zeros(2, 3, HIDDEN, dtype=torch.int64)}, "floating"),
    "other batch": ({"hidden": noise(3, 3, HIDDEN)}, "3 rows, the session 2"),
    "short mask": ({"attention_mask": torch.ones(2, 3, dtype=torch.int64)}, r"must be \(2, 7\), got \(2, 3\)"),
    "float mask": ({"attention_mask": torch.ones(2, 7)}, "integer or bool"),
    "prompts later on": ({"prompts": noise(BLOCKS, 2, 1, HIDDEN)}, "position 0, this is 4"),
    "prompts for other blocks": ({"prompts": noise(3, 2, 1, HIDDEN)}, r"prompts must be \(4, 2, at most 3, 32\)"),
    "prompts too long": ({"prompts": noise(BLOCKS, 2, 5, HIDDEN)}, "at most 3"),
    "too few beams": ({"hypo_ids": torch.tensor([0])}, r"must be \(2,\) int64"),
    "strange beam": ({"hypo_ids": torch.tensor([0, 2])}, r"rows 0\.\.1"),
    "negative beam": ({"hypo_ids": torch.tensor([0, -1])}, r"rows 0\.\.1"),
    "float beams": ({"hypo_ids": torch.tensor([0.0, 1.0])}, "int64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_step_that_does_not_fit_changes_nothing(case: str, llama: Tiny) -> None:
    wrong, says = WRONG[case]
    cache = llama.whole.new_cache(range(BLOCKS), 2, 8)
    hidden = noise(2, 7, HIDDEN)
    llama.whole.step(hidden[:, :4], cache)
    with pytest.raises(StepError, match=says):
        llama.whole.step(**{"hidden": hidden[:, 4:], "cache": cache, **wrong})  # type: ignore[arg-type]
    assert cache.position == 4
    assert_rounded(llama.whole.step(hidden[:, 4:], cache), llama.whole.forward(hidden, range(BLOCKS))[:, 4:])


def test_a_full_cache(llama: Tiny) -> None:
    cache = llama.whole.new_cache(range(BLOCKS), 1, 4)
    llama.whole.step(noise(1, 3, HIDDEN), cache)
    with pytest.raises(CacheFull, match="2 more tokens at position 3 exceed the session's 4"):
        llama.whole.step(noise(1, 2, HIDDEN), cache)
    assert cache.position == 3
    llama.whole.step(noise(1, 1, HIDDEN), cache)
    assert cache.position == 4


@pytest.mark.parametrize("position", [-1, 4])
def test_rolling_back_to_where_nothing_is(position: int, llama: Tiny) -> None:
    cache = llama.whole.new_cache(range(BLOCKS), 1, 4)
    llama.whole.step(noise(1, 3, HIDDEN), cache)
    with pytest.raises(StepError, match="the cache holds 3 tokens"):
        cache.rollback(position)
    assert cache.position == 3


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "library"])
def test_a_block_that_fails_half_way_leaves_no_trace(lean: bool, llama: Tiny) -> None:
    """Blocks before it have appended their keys and values already."""
    span = llama.whole
    with nullcontext() if lean else span.library_path():
        assert span.lean == lean
        fail_half_way(span)


def fail_half_way(span: BlockSpan) -> None:
    cache = span.new_cache(range(BLOCKS), 1, 8)
    hidden = noise(1, 6, HIDDEN)
    span.step(hidden[:, :3], cache)

    with pytest.MonkeyPatch.context() as patch:
        calls = iter(range(3 * BLOCKS))
        silu = F.silu

        def third_fails(*args: Any, **kwargs: Any) -> Tensor:
            if next(calls) == 2:
                raise MemoryError
            return silu(*args, **kwargs)

        patch.setattr(F, "silu", third_fails)  # in the MLP of every block
        with pytest.raises(MemoryError):
            span.step(hidden[:, 3:], cache)
    assert cache.position == 3
    assert_rounded(span.step(hidden[:, 3:], cache), span.forward(hidden, range(BLOCKS))[:, 3:])


@pytest.mark.parametrize("blocks", [range(5), range(2, 2), range(3, 1), range(0, 4, 2), range(-1, 2)], ids=str)
def test_blocks_outside_the_span(blocks: range, llama: Tiny) -> None:
    with pytest.raises(BlockRangeError, match="within the loaded 0:4"):
        llama.whole.new_cache(blocks, 1, 4)
    with pytest.raises(BlockRangeError):
        llama.whole.cache_bytes(blocks, 1, 4)
    with pytest.raises(BlockRangeError):
        llama.whole.forward(noise(1, 2, HIDDEN), blocks)


@pytest.mark.parametrize(("batch_size", "max_length"), [(0, 4), (1, 0), (-1, 4)])
def test_sessions_of_no_size(batch_size: int, max_length: int, llama: Tiny) -> None:
    with pytest.raises(StepError, match="at least 1"):
        llama.whole.new_cache(range(BLOCKS), batch_size, max_length)


def test_cache_bytes_are_those_of_the_tensors(tiny: Tiny) -> None:
    """What a lease says is what is allocated, for every family."""
    blocks = range(1, 3)
    cache = tiny.whole.new_cache(blocks, 3, 20)
    assert cache.nbytes == tiny.whole.cache_bytes(blocks, 3, 20) == held_bytes(cache)


def held_bytes(cache: SpanCache) -> int:
    layers = [cache.layer(block) for block in cache.blocks]
    tensors = [t for layer in layers for t in (layer.keys, layer.values, layer.index_keys) if t is not None]
    recall = cache._recall
    if recall is None:
        return sum(tensor.nbytes for tensor in tensors)
    tensors += [*recall.states * (1 + SNAPSHOTS), recall.inputs]
    return sum(tensor.nbytes for tensor in tensors) + MASK_BYTES * cache.batch_size * cache.max_length


def test_half_precision_takes_half_the_cache(llama: Tiny) -> None:
    half = load_span(llama.checkpoint, range(BLOCKS), dtype=torch.bfloat16)
    assert half.weight_bytes * 2 == load_stock(llama.checkpoint, half.blocks).weight_bytes
    assert half.cache_bytes(half.blocks, 1, 64) * 2 == llama.whole.cache_bytes(half.blocks, 1, 64)
    hidden = noise(2, 5, HIDDEN)
    out = half.step(hidden, half.new_cache(half.blocks, 2, 5))
    assert out.dtype == torch.float32, "the answer comes in the dtype of the question"
    exact = llama.whole.forward(hidden, range(BLOCKS))
    assert float((out - exact).norm() / exact.norm()) < 0.05


def test_prompts_at_the_first_step(llama: Tiny) -> None:
    hidden, prompts = noise(2, 6, HIDDEN), noise(2, 2, 3, HIDDEN).flip(0)
    blocks = range(1, 3)
    cache = llama.whole.new_cache(blocks, 2, 6)
    stepped = [llama.whole.step(hidden[:, :4], cache, prompts=prompts), llama.whole.step(hidden[:, 4:], cache)]
    with torch.no_grad():
        whole = llama.whole.forward(hidden, blocks, prompts=prompts)
        plain = llama.whole.forward(hidden, blocks)
    assert_rounded(torch.cat(stepped, 1), whole)
    assert not torch.allclose(whole, plain)
    assert_close(llama.whole.forward(hidden, blocks, prompts=prompts[:, :, :0]), plain)


def test_a_mask_of_ones_is_no_mask(llama: Tiny) -> None:
    hidden = noise(2, 5, HIDDEN)
    with_mask = llama.whole.forward(hidden, range(BLOCKS), attention_mask=torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(with_mask, llama.whole.forward(hidden, range(BLOCKS)))


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
}
EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 4,
}


@pytest.fixture
def unlisted(make_tiny: Callable[[Case], Tiny]) -> Callable[..., Tiny]:
    return lambda model_type, **settings: make_tiny(Case(f"unlisted-{model_type}", model_type, "", SMALL | settings))


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("cohere", {}), ("smollm3", {"pad_token_id": None}), ("deepseek_v3", EXPERTS), ("gpt_oss", {"head_dim": 8})],
)
def test_families_nobody_listed_are_exact(
    model_type: str, settings: dict[str, object], unlisted: Callable[..., Tiny]
) -> None:
    """Among them one whose first block differs in kind, and whose keys and values differ in size."""
    tiny = unlisted(model_type, **settings)
    ids = torch.randint(2, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        inputs = tiny.reference.run_in_steps(ids, [5, 6])
    cache = tiny.parts[1].new_cache(range(1, 4), 2, 8)
    out = torch.cat([tiny.parts[1].step(inputs[1][:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 8))], 1)
    assert_rounded(out, inputs[-1])
    assert cache.nbytes == held_bytes(cache)


@pytest.mark.parametrize(
    ("model_type", "settings", "why"),
    [
        ("recurrent_gemma", {"lru_width": HIDDEN, "block_types": ["recurrent", "attention"]}, "in themselves"),
        ("minimax", {"layer_types": ["linear_attention", "full_attention"] * 2}, "cache of its own"),
    ],
)
def test_blocks_with_another_memory_are_refused(
    model_type: str, settings: dict[str, object], why: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp(model_type)
    case = Case(model_type, model_type, "", SMALL | settings)
    make_model(case.config()).save_pretrained(directory)
    with pytest.raises(UnsupportedModel, match=why) as caught:
        load_span(open_checkpoint(directory), range(4))
    assert model_type in str(caught.value)


def test_threads_share_a_span_but_not_what_it_adds(llama: Tiny) -> None:
    """Prompts are added by hooks on modules that all threads use."""
    hidden, blocks = noise(1, 6, HIDDEN), range(BLOCKS)
    prompts = [None, *(noise(BLOCKS, 1, 2, HIDDEN) * scale for scale in (1.0, 2.0, 3.0))]

    def run(one: Tensor | None) -> Tensor:
        with torch.no_grad():
            return llama.whole.forward(hidden, blocks, prompts=one)

    expected = [run(one) for one in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for ours, theirs in zip(pool.map(run, prompts), expected, strict=True):
                assert_close(ours, theirs)


def test_the_text_blocks_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    """Its vision tower has as many blocks, under a name that comes first."""
    text = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
    vision = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert all("vision" not in name for block in range(4) for name, _ in checkpoint.block_tensors(block))
    assert load_span(checkpoint, range(1, 3)).hidden_size == HIDDEN
