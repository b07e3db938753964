"""What is trained at home: gradients equal those of PEFT, or of the whole model; files are PEFT's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from petals.models.blocks.adapters import load_lora
from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.distributed import load_model
from petals.models.client.local import LocalChain
from petals.models.client.tuning import LoraSettings, Tuning
from petals.models.errors import CheckpointError, StepError
from tests.models.conftest import Tiny
from tests.models.tiny import BLOCKS, CASES, VOCABULARY, Case, Reference
from tests.tolerance import assert_rounded

pytestmark = pytest.mark.filterwarnings(  # peft about transformers
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:fan_in_fan_out is set to False:UserWarning",
)
TARGETS = {"llama": ["q_proj", "v_proj"], "bloom": ["query_key_value"], "gpt2": ["c_attn"]}
PREFIX = 3


def batch() -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.fixture(params=TARGETS)
def family(request: pytest.FixtureRequest, make_tiny: Callable[[Case], Tiny]) -> Tiny:
    return make_tiny(next(case for case in CASES if case.id == request.param))


def local(tiny: Tiny) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.directory, dtype=torch.float32)


def liven(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_prompt_tuning_is_pefts(family: Tiny, tmp_path: Path) -> None:
    import peft

    model = load_causal_lm(family.checkpoint, LocalChain(family.parts), tuning=Tuning(mode="ptune", pre_seq_len=PREFIX))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(local(family), str(tmp_path))
    theirs.prompt_encoder["default"].embedding.weight.requires_grad_()
    ids = batch()["input_ids"][:1]  # no padding: PEFT counts positions over it, `generate` and we do not
    ours_out, theirs_out = model(ids).logits, theirs(ids).logits[:, PREFIX:]
    assert_rounded(ours_out, theirs_out)
    weight = torch.randn(ours_out.shape, generator=torch.Generator().manual_seed(3))
    (ours_out * weight).sum().backward()
    (theirs_out * weight).sum().backward()
    gradient = model.transformer.prompt_embeddings.weight.grad
    assert relative(gradient, theirs.prompt_encoder["default"].embedding.weight.grad) < 1e-3


def test_deep_prompts_are_added_to_every_blocks_input(family: Tiny) -> None:
    tuning = Tuning(mode="deep_ptune", pre_seq_len=PREFIX)
    model = load_causal_lm(family.checkpoint, LocalChain(family.parts), tuning=tuning)
    base = model.transformer
    plain = load_causal_lm(family.checkpoint, LocalChain(family.parts), tuning=Tuning(mode="ptune", pre_seq_len=PREFIX))
    with torch.no_grad():
        plain.transformer.prompt_embeddings.weight.copy_(base.prompt_embeddings.weight)
        ids = batch()["input_ids"][:1]
        assert torch.equal(model(ids).logits, plain(ids).logits)  # it begins as "ptune"
    liven([base.intermediate_prompt_embeddings.weight])
    prompt, deep = model.get_prompt(1)
    assert deep.shape == (BLOCKS, 1, PREFIX, prompt.shape[2])
    reference = local(family)
    layers = Reference(reference).layers

    def add(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = torch.cat([hidden[:, :PREFIX] + deep[index], hidden[:, PREFIX:]], dim=1)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(add(index), with_kwargs=True)
    embeds = torch.cat([prompt, reference.get_input_embeddings()(ids)], dim=1)
    expected = reference(inputs_embeds=embeds, use_cache=False).logits[:, PREFIX:]
    ours = model(ids).logits
    assert_rounded(ours, expected)
    trained = [base.prompt_embeddings.weight, base.intermediate_prompt_embeddings.weight]
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    mine = torch.autograd.grad((ours * weight).sum(), trained)
    yours = torch.autograd.grad((expected * weight).sum(), trained)
    assert all(relative(a, b) < 1e-3 for a, b in zip(mine, yours, strict=True))


def test_lora_is_pefts(family: Tiny, tmp_path: Path) -> None:
    import peft

    targets = TARGETS[family.case.id]
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
    tuning = Tuning(mode="lora", lora=LoraSettings.of_peft(settings))
    model = load_causal_lm(family.checkpoint, LocalChain(family.parts), tuning=tuning)
    plain = load_causal_lm(family.checkpoint, LocalChain(family.parts))
    inputs = batch()
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)  # it begins as the model is
    liven(model.transformer.lora.parameters())
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(local(family), str(tmp_path), is_trainable=True)
    ours_out, theirs_out = model(**inputs), theirs(**inputs)
    assert_rounded(ours_out.loss, theirs_out.loss)
    ours_out.loss.backward()
    theirs_out.loss.backward()
    yours = {name: each.grad for name, each in theirs.named_parameters() if each.grad is not None}
    mine = {
        f"{name.removesuffix('.weight')}.default.weight": tensor.grad
        for name, tensor in named_like_the_file(model, tmp_path).items()
    }
    assert set(mine) == set(yours)
    assert len(mine) == 2 * BLOCKS * len(targets)
    assert all(relative(mine[name], yours[name]) < 1e-3 for name in mine)
    text = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    said = [each.generate(**text, max_new_tokens=8, do_sample=False) for each in (model, theirs.eval())]
    assert torch.equal(*said)
    hosted = load_lora(tmp_path, family.whole)  # a server may host the result
    assert len(hosted.layers) == BLOCKS * len(targets)


def named_like_the_file(model: Any, directory: Path) -> dict[str, Tensor]:
    """The factors themselves under the names of the file, matched by their values."""
    saved = load_file(directory / "adapter_model.safetensors")
    factors = list(model.transformer.lora.parameters())
    return {name: next(f for f in factors if torch.equal(f, tensor)) for name, tensor in saved.items()}


def test_a_classifier_trains_its_own_head(family: Tiny, tmp_path: Path) -> None:
    settings = {"num_labels": 3, "pad_token_id": 0}
    reference = AutoModelForSequenceClassification.from_pretrained(family.directory, dtype=torch.float32, **settings)
    model = load_model(
        family.checkpoint,
        LocalChain(family.parts),
        head="sequence_classification",
        tuning=Tuning(mode="ptune", pre_seq_len=PREFIX),
        **settings,
    )
    with torch.no_grad():
        model.score.weight.copy_(reference.score.weight)
    inputs = {"input_ids": batch()["input_ids"][:1], "labels": torch.tensor([2])}
    embeds = torch.cat([model.get_prompt(1)[0], reference.get_input_embeddings()(inputs["input_ids"])], dim=1)
    expected = reference(inputs_embeds=embeds, labels=inputs["labels"])
    ours = model(**inputs)
    assert_rounded(ours.logits, expected.logits)
    assert_rounded(ours.loss, expected.loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(20):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 * float(ours.loss.detach())

    model.save_pretrained(tmp_path)
    again = load_model(
        family.checkpoint,
        LocalChain(family.parts),
        head="sequence_classification",
        tuning=Tuning(mode="ptune", pre_seq_len=PREFIX),
        **settings,
    )
    again.load_trained(tmp_path)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_files_that_do_not_fit(llama: Tiny, tmp_path: Path) -> None:
    def opened(**tuning: Any) -> Any:
        return load_causal_lm(llama.checkpoint, LocalChain(llama.parts), tuning=Tuning(**tuning))

    with pytest.raises(StepError, match="nothing is trained here"):
        opened().save_pretrained(tmp_path)
    opened(mode="ptune", pre_seq_len=4).save_pretrained(tmp_path / "short")
    config = json.loads((tmp_path / "short" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PROMPT_TUNING", 4)
    with pytest.raises(CheckpointError, match=r"has the shape \(4, 32\), here \(5, 32\)"):
        opened(mode="ptune", pre_seq_len=5).load_trained(tmp_path / "short")
    with pytest.raises(CheckpointError, match="was trained otherwise"):
        opened(mode="deep_ptune", pre_seq_len=4).load_trained(tmp_path / "short")
    with pytest.raises(CheckpointError, match="that can be read"):
        opened(mode="ptune").load_trained(tmp_path / "nowhere")


def test_tunings_that_cannot_be(llama: Tiny) -> None:
    import peft

    with pytest.raises(StepError, match="unknown tuning_mode 'prefix'"):
        Tuning(mode="prefix")  # type: ignore[arg-type]
    with pytest.raises(StepError, match="pre_seq_len of at least 1"):
        Tuning(mode="ptune", pre_seq_len=0)
    with pytest.raises(StepError, match="at least 1, got 0"):
        LoraSettings(rank=0)
    with pytest.raises(StepError, match="no layer of a block is called nothing; there are down_proj"):
        load_causal_lm(
            llama.checkpoint,
            LocalChain(llama.parts),
            tuning=Tuning(mode="lora", lora=LoraSettings(targets=("nothing",))),
        )
    with pytest.raises(CheckpointError, match="lora_config uses use_dora=True"):
        LoraSettings.of_peft(peft.LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(StepError, match="must follow one another"):
        LoraSettings.of_peft(peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 2]))
    settings = LoraSettings.of_peft(peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1, 2]))
    model = load_causal_lm(llama.checkpoint, LocalChain(llama.parts), tuning=Tuning(mode="lora", lora=settings))
    assert {block for block, _ in model.transformer.lora.pairs()} == {1, 2}
