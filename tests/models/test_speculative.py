"""Speculative decoding says exactly what greedy decoding says, however good or bad the drafts are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from petals.models.client.distributed import load_model
from petals.models.client.local import LocalChain
from petals.models.client.speculative import SpeculativeMixin
from petals.models.client.tuning import Tuning
from petals.models.errors import StepError
from tests.models.conftest import Tiny
from tests.models.tiny import CASES, VOCABULARY, make_model

FAMILIES = ("llama", "bloom", "gpt2", "gemma3", "mistral")


def prompts(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (batch, 7), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def speculating(tiny: Tiny, drafter: Any, **settings: Any) -> Any:
    model = load_model(tiny.checkpoint, LocalChain(tiny.parts), mixins=(SpeculativeMixin,), **settings)
    model.use_drafts_of(drafter)
    return model


def drafter_like(tiny: Tiny, noise: float) -> Any:
    """The model itself with some noise in its head: 0 drafts without a mistake, a lot is always wrong."""
    model = make_model(tiny.case.config())
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.add_(noise * torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.fixture(params=[case for case in CASES if case.id in FAMILIES], ids=lambda case: case.id)
def family(request: pytest.FixtureRequest, make_tiny: Callable[..., Tiny]) -> Tiny:
    return make_tiny(request.param)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("noise", [0.0, 0.05, 3.0])
def test_the_tokens_are_those_of_greedy_decoding(family: Tiny, noise: float, batch: int) -> None:
    model = speculating(family, drafter_like(family, noise))
    settings = {"max_new_tokens": 24, "do_sample": False}
    expected = family.reference.fresh().generate(**prompts(batch), **settings)
    assert torch.equal(model.generate(**prompts(batch), **settings), expected)
    report = model.speculation
    assert report.tokens == 24
    assert report.accepted + report.steps == report.tokens  # each step adds one token of its own: the bonus
    if noise == 0:
        assert report.accepted == report.drafted
        assert report.tokens_per_step > 4  # drafts grow while they are right


def test_processors_streams_and_ends(llama: Tiny) -> None:
    """Penalties see drafted tokens as text; a row that has ended is padded, and no longer holds others up."""
    whole = llama.reference.fresh()
    plain = whole.generate(**prompts(2), max_new_tokens=20)
    stop = int(plain[0, 12])  # the first row ends here
    settings = {"max_new_tokens": 20, "eos_token_id": stop, "pad_token_id": 0, "repetition_penalty": 1.2}
    expected = whole.generate(**prompts(2), **settings)
    model = speculating(llama, drafter_like(llama, 0.05))
    assert torch.equal(model.generate(**prompts(2), **settings), expected)

    class Sink:
        def __init__(self) -> None:
            self.tokens: list[Tensor] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens.append(value)

        def end(self) -> None:
            self.ended = True

    sink = Sink()
    model.generate(**prompts(2), streamer=sink, **settings)
    assert torch.equal(torch.stack(sink.tokens[1:], dim=1), expected[:, 7:])
    assert sink.ended


def test_sessions_and_trained_prompts(bloom: Tiny) -> None:
    ids = prompts(2)["input_ids"][1:]
    model = speculating(bloom, drafter_like(bloom, 0.05), tuning=Tuning(mode="ptune", pre_seq_len=2))
    plain = load_model(bloom.checkpoint, LocalChain(bloom.parts))
    model.transformer.prompt_embeddings.weight.requires_grad_(False)
    with model.inference_session(max_length=40) as session:
        parts = [model.generate(ids, max_new_tokens=5), model.generate(max_new_tokens=6)]
        assert session.position == 17
    embeds = torch.cat([model.get_prompt(1)[0], plain.get_input_embeddings()(ids)], dim=1)
    expected = bloom.reference.fresh().generate(inputs_embeds=embeds, max_new_tokens=11, do_sample=False)
    assert torch.equal(torch.cat(parts, dim=1)[:, 7:], expected)


def test_what_cannot_be_drafted(llama: Tiny, tmp_path: Path) -> None:
    model = speculating(llama, drafter_like(llama, 0.0))
    for settings in ({"do_sample": True}, {"num_beams": 2}):
        with pytest.raises(StepError, match="speculative decoding is greedy"):
            model.generate(**prompts(1), max_new_tokens=3, **settings)
    config = llama.case.config()
    config.vocab_size = 50
    with pytest.raises(StepError, match="small_model knows 50 tokens, this model 199"):
        model.use_drafts_of(make_model(config))
