"""LoRA on blocks equals PEFT on the whole model: hosted adapters, and adapters a client trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from petals.models.blocks.adapters import Lora, LowRank, load_lora
from petals.models.errors import CheckpointError, StepError
from petals.models.source.loading import load_span
from tests.models.conftest import Tiny
from tests.models.tiny import BLOCKS, CASES, HIDDEN, VOCABULARY, Case, Reference
from tests.tolerance import assert_rounded, rounding

pytestmark = pytest.mark.filterwarnings(  # peft about transformers
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
)
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bloom": ["query_key_value"], "gpt2": ["c_attn", "c_fc"]}


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_ids() -> Tensor:
    return torch.randint(2, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def tuned(make_tiny: Callable[[Case], Tiny], tmp_path: Path) -> Callable[..., tuple[Tiny, Any, Path]]:
    """A family's tiny checkpoint, its model under PEFT with lively factors, and the directory PEFT saved."""
    import peft
    from transformers import AutoModelForCausalLM

    def make(family: str, seed: int = 0, **settings: Any) -> tuple[Tiny, Any, Path]:
        tiny = make_tiny(next(case for case in CASES if case.id == family))
        base = AutoModelForCausalLM.from_pretrained(tiny.directory, dtype=torch.float32)
        usual = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2"}
        config = peft.LoraConfig(task_type="CAUSAL_LM", **(usual | settings))
        model = peft.get_peft_model(base, config).eval()
        with torch.no_grad():
            for index, (name, factor) in enumerate(model.named_parameters()):
                if "lora_" in name:
                    factor.copy_(0.3 * noise(*factor.shape, seed=seed * 1000 + index))
        directory = tmp_path / f"adapter{seed}"
        model.save_pretrained(directory)
        return tiny, model, directory

    return make


@pytest.mark.parametrize("family", TARGETS)
@torch.no_grad()
def test_hosted_adapters_equal_peft(family: str, tuned: Callable[..., tuple[Tiny, Any, Path]]) -> None:
    tiny, model, directory = tuned(family)
    inputs, _ = Reference(model.base_model.model).run(some_ids(), use_cache=False)
    span = load_span(tiny.checkpoint, range(1, BLOCKS))
    span.add_adapter(load_lora(directory, span))
    hidden, expected = inputs[1], inputs[-1]
    assert span.adapters == (directory.name,)
    assert_rounded(span.forward(hidden, span.blocks, adapter=directory.name), expected)
    cache = span.new_cache(span.blocks, 2, 8)
    steps = [span.step(hidden[:, a:b], cache, adapter=directory.name) for a, b in ((0, 5), (5, 6), (6, 8))]
    assert_rounded(torch.cat(steps, 1), expected)
    plain = tiny.whole.forward(hidden, span.blocks)
    assert_rounded(span.forward(hidden, span.blocks), plain)
    assert not torch.allclose(plain, expected, **rounding(expected))


@torch.no_grad()
def test_requests_choose_among_adapters(tuned: Callable[..., tuple[Tiny, Any, Path]]) -> None:
    tiny, one, first = tuned("llama", 0)
    _, two, second = tuned("llama", 1, r=5, use_rslora=True, alpha_pattern={"v_proj": 9})
    span = load_span(tiny.checkpoint, range(BLOCKS))
    for directory in (first, second):
        span.add_adapter(load_lora(directory, span))
    caches = {name: span.new_cache(span.blocks, 2, 8) for name in (first.name, second.name)}
    for model, name in ((one, first.name), (two, second.name)):
        inputs, _ = Reference(model.base_model.model).run(some_ids(), use_cache=False)
        assert_rounded(span.step(inputs[0], caches[name], adapter=name), inputs[-1])


def test_a_client_trains_factors_on_blocks_it_does_not_hold(
    tuned: Callable[..., tuple[Tiny, Any, Path]],
) -> None:
    tiny, model, directory = tuned("llama")
    inputs, _ = Reference(model.base_model.model).run(some_ids(), use_cache=False)
    outer = noise(*inputs[-1].shape)
    (inputs[-1] * outer).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "lora_" in name}

    span = load_span(tiny.checkpoint, range(BLOCKS))
    hosted = load_lora(directory, span)
    mine = Lora(
        "mine",
        {
            place: LowRank(layer.a.clone().requires_grad_(), layer.b.clone().requires_grad_(), 5 / 3)
            for place, layer in hosted.layers.items()
        },
    )
    out = span.forward(inputs[0].detach(), span.blocks, adapter=mine)
    gradients = torch.autograd.grad((out * outer).sum(), mine.factors())
    names = [
        f"base_model.model.model.layers.{block}.{path}.lora_{side}.default.weight"
        for block, path in mine.layers
        for side in "AB"
    ]
    assert set(names) == set(expected)
    for name, gradient in zip(names, gradients, strict=True):
        assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()))
    assert mine.nbytes == sum(factor.numel() * 4 for factor in mine.factors())


def test_adapters_on_quantised_blocks(tuned: Callable[..., tuple[Tiny, Any, Path]]) -> None:
    tiny, _, directory = tuned("llama")
    exact, int8 = (load_span(tiny.checkpoint, range(1), quant_type=kind) for kind in ("none", "int8"))
    hidden = noise(1, 6, HIDDEN)
    for span in (exact, int8):
        span.add_adapter(load_lora(directory, span, name="tuned"))
    one, two = (span.forward(hidden, range(1), adapter="tuned") for span in (exact, int8))
    assert float((one - two).norm() / one.norm()) < 0.06


def test_adapters_that_do_not_fit(llama: Tiny) -> None:
    span, hidden = llama.whole, noise(1, 4, HIDDEN)
    with pytest.raises(StepError, match="no adapter 'missing' here; hosted are: none"):
        span.forward(hidden, span.blocks, adapter="missing")

    def mine(block: int, path: str, a: Tensor, b: Tensor) -> Lora:
        return Lora("mine", {(block, path): LowRank(a, b, 1.0)})

    for lora, says in (
        (mine(7, "mlp.up_proj", noise(2, 32), noise(48, 2)), "is for block 7, loaded are 0:4"),
        (mine(1, "mlp.nothing", noise(2, 32), noise(48, 2)), r"has no linear layer 'mlp\.nothing'"),
        (mine(1, "mlp.up_proj", noise(2, 31), noise(48, 2)), "takes 32 and gives 48"),
        (mine(1, "mlp.up_proj", noise(2, 32), noise(48, 3)), "do not fit"),
    ):
        with pytest.raises(StepError, match=says):
            span.forward(hidden, span.blocks, adapter=lora)


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def rename_weights(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def drop_half(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "lora_B" not in k}, file)


def touch_the_head(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 32)}, file)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "is no PEFT adapter"),
        (change_config(peft_type="IA3"), "is IA3, only LORA"),
        (change_config(use_dora=True), "uses use_dora=True"),
        (change_config(bias="all"), "uses bias='all'"),
        (rename_weights, "pickles are not read"),
        (drop_half, "only half of the factors"),
        (touch_the_head, "changes base_model.model.lm_head"),
    ],
)
def test_adapters_that_cannot_be_served(
    damage: Callable[[Path], None], says: str, tuned: Callable[..., tuple[Tiny, Any, Path]]
) -> None:
    tiny, _, directory = tuned("llama")
    damage(directory)
    with pytest.raises(CheckpointError, match=says):
        load_lora(directory, tiny.whole)
