"""docs/custom-model.md does what it says, and models that break the contract are refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from petals.models import families
from petals.models.errors import UnsupportedModel
from petals.models.families import Family, register_family
from petals.models.library_contract import DEFAULT_CACHE_NAME, pop_cache
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from tests.models.tiny import BLOCKS, HIDDEN, enliven

DOCUMENT = Path(__file__).parents[2] / "docs" / "custom-model.md"


@pytest.fixture(autouse=True)
def _forget_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))


def test_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) == 4
    module = ModuleType("custom")  # as if it were a file of the reader's, which the library looks up
    monkeypatch.setitem(sys.modules, "custom", module)
    names: dict[str, Any] = module.__dict__
    names["directory"] = tmp_path
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    assert names["logits"].shape == (1, 10, 128)


class ScalesBefore(LlamaModel):
    def forward(self, *args: Any, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, inputs_embeds=inputs_embeds * 2, **kwargs)


class ScalesAfter(LlamaModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = super().forward(*args, **kwargs)
        result.last_hidden_state = result.last_hidden_state * 2
        return result


class ForgetsTheCache(LlamaModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = pop_cache(kwargs)
        if cache is not None and cache.get_seq_length() > 0:
            super().forward(*args, **{DEFAULT_CACHE_NAME: cache}, **kwargs)
            cache, kwargs["use_cache"] = None, False
        return super().forward(*args, **{DEFAULT_CACHE_NAME: cache}, **kwargs)


class IgnoresPadding(LlamaModel):
    def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class LooksAtTheContent(LlamaModel):
    def forward(self, *args: Any, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, inputs_embeds=inputs_embeds, summary=inputs_embeds.mean(), **kwargs)


class HasBlocksWithoutMemory(LlamaModel):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for block in self.layers:
            block.forward = lambda hidden_states, **kwargs: hidden_states * 2  # type: ignore[method-assign]


REFUSED = {
    ScalesBefore: "before the first block",
    ScalesAfter: "after the last block",
    ForgetsTheCache: "with a cache differs",
    IgnoresPadding: "looks at padding",
    LooksAtTheContent: "more than a hidden state",
}


@pytest.fixture(scope="module")
def plain_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    enliven(model)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("verified", [False, True], ids=["unlisted", "listed"])
@pytest.mark.parametrize("base_class", REFUSED, ids=lambda base_class: base_class.__name__)
def test_a_model_that_breaks_the_contract_is_refused(base_class: Any, verified: bool, plain_llama: Path) -> None:
    """A listed family too: a later version of the library may do something else."""
    register_family(Family(model_type="llama", title="Odd", base_class=base_class, verified=verified))
    with pytest.raises(UnsupportedModel, match=REFUSED[base_class]):
        load_span(open_checkpoint(plain_llama), range(1, 3))


@torch.no_grad()
def test_blocks_without_memory_need_none(plain_llama: Path) -> None:
    register_family(Family(model_type="llama", title="Odd", base_class=HasBlocksWithoutMemory))
    span = load_span(open_checkpoint(plain_llama), range(1, 3))
    hidden = torch.randn(1, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    assert torch.equal(span.forward(hidden, range(1, 3)), hidden * 4)


def test_the_self_test_passes_an_honest_stranger(plain_llama: Path) -> None:
    register_family(Family(model_type="llama", title="Unheard of", base_class=LlamaModel, layers="layers"))
    span = load_span(open_checkpoint(plain_llama), range(1, 3))
    assert span.blocks == range(1, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_self_test_bears_half_precision(dtype: torch.dtype, plain_llama: Path) -> None:
    register_family(Family(model_type="llama", title="Unheard of", base_class=LlamaModel))
    assert load_span(open_checkpoint(plain_llama), range(4), dtype=dtype).dtype == dtype


def test_numbers_that_overflow_are_refused(plain_llama: Path) -> None:
    checkpoint = open_checkpoint(plain_llama)
    read = checkpoint.read_stored
    checkpoint.read_stored = lambda *a: read(*a) * 1e6  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModel, match="not finite"):
        load_span(checkpoint, range(4), dtype=torch.float16)
