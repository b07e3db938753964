"""Client models of every family, over blocks at home in two pieces: what they say is what the whole model says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from petals.models.blocks.block import position_ids
from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.distributed import load_model
from petals.models.client.local import LocalChain
from petals.models.client.tuning import Tuning
from petals.models.errors import StepError
from petals.models.families import base_of
from petals.models.library_contract import DEFAULT_CACHE_NAME
from tests.models.conftest import Tiny
from tests.models.tiny import BLOCKS, HIDDEN, VOCABULARY
from tests.tolerance import assert_rounded

PREFIX = 3
NO_EMBEDS = ("falcon_h1",)
"""Whose own `generate` takes no `inputs_embeds`."""


def some_ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


def padded() -> dict[str, Tensor]:
    """Two prompts of different lengths, the first one padded on the left."""
    ids, mask = some_ids(), torch.ones(2, 9, dtype=torch.int64)
    ids[0, :4], mask[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def client(tiny: Tiny, **settings: Any) -> Any:
    return load_causal_lm(tiny.checkpoint, LocalChain(tiny.parts), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "repetition_penalty": 1.3},
        {"do_sample": True, "top_p": 0.9, "temperature": 0.7},
    ],
    ids=["greedy", "beams", "beams-penalty", "sampling"],
)
def test_a_padded_batch_generates_the_same_tokens(tiny: Tiny, settings: dict[str, Any]) -> None:
    model = client(tiny)
    results = []
    for each in (model, tiny.reference.fresh()):
        torch.manual_seed(3)
        results.append(each.generate(**padded(), max_new_tokens=8, **settings))
    assert torch.equal(*results)


@torch.no_grad()
def test_a_head_in_int8_multiplies_by_its_own_weights_rounded(tiny: Tiny) -> None:
    """The embeddings, which may be the same tensor, and all hidden states stay exact."""
    exact, rounded = client(tiny), client(tiny, head_quant="int8")
    one, other = (model(some_ids(), output_hidden_states=True) for model in (exact, rounded))
    for theirs, ours in zip(one.hidden_states, other.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    largest = float(one.logits.abs().max())
    assert 0 < float((other.logits - one.logits).abs().max()) < 0.03 * largest
    assert rounded.generate(some_ids(), max_new_tokens=3, do_sample=False).shape == (2, 12)


@torch.no_grad()
def test_hidden_states_of_every_block(tiny: Tiny) -> None:
    ids = some_ids()
    ours, theirs = (each(ids, output_hidden_states=True) for each in (client(tiny), tiny.reference.fresh()))
    assert_rounded(ours.logits, theirs.logits)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == BLOCKS + 1
    for mine, yours in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_rounded(mine, yours)


@torch.no_grad()
def test_hidden_states_while_generating(bloom: Tiny) -> None:
    settings = {"max_new_tokens": 4, "output_hidden_states": True, "return_dict_in_generate": True}
    ours, theirs = (each.generate(some_ids(), **settings) for each in (client(bloom), bloom.reference.fresh()))
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, yours in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert [tuple(state.shape) for state in mine] == [tuple(state.shape) for state in yours]
        for state, expected in zip(mine, yours, strict=True):
            assert_rounded(state, expected)


@torch.no_grad()
def test_a_trained_prompt_is_text_in_front(tiny: Tiny) -> None:
    """The whole model gets the same vectors as `inputs_embeds`; all but the prompt's own positions are compared."""
    model = client(tiny, tuning=Tuning(mode="ptune", pre_seq_len=PREFIX))
    reference = tiny.reference.fresh()
    batch = padded()
    prompt, deep = model.get_prompt(batch_size=2)
    assert deep is None
    embeds = torch.cat([prompt, reference.get_input_embeddings()(batch["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(2, PREFIX, dtype=torch.int64), batch["attention_mask"]], dim=1)
    theirs, ours = (
        {} if tiny.case.model_type == "bloom" else {"position_ids": position_ids(each)}
        for each in (mask, batch["attention_mask"])
    )
    expected = reference(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **theirs).logits[:, PREFIX:]
    real = batch["attention_mask"].bool()
    assert_rounded(model(**batch, **ours).logits[real], expected[real])
    if tiny.case.model_type in NO_EMBEDS:
        return
    settings = {"max_new_tokens": 6, "do_sample": False}
    said = tiny.reference.fresh().generate(inputs_embeds=embeds, attention_mask=mask, **settings)
    assert torch.equal(model.generate(**batch, **settings)[:, 9:], said)


def test_the_prompt_is_sent_once_and_again_after_a_rollback_to_nothing(bloom: Tiny) -> None:
    model = client(bloom, tuning=Tuning(mode="deep_ptune", pre_seq_len=PREFIX))
    with torch.no_grad():
        model.transformer.intermediate_prompt_embeddings.weight.normal_()
    ids = some_ids(batch=1)
    whole = model.generate(ids, max_new_tokens=6)
    with model.inference_session(max_length=15) as session:
        first = model.generate(ids, max_new_tokens=3)
        assert (session.position, session.cache.held) == (11, 11 + PREFIX)
        assert torch.equal(torch.cat([first, model.generate(max_new_tokens=3)], dim=1), whole)
        session.position = 4
        assert torch.equal(model.generate(ids[:, 4:], max_new_tokens=6), whole[:, 4:])
        session.position = 0
        assert session.cache.held == 0
        assert torch.equal(model.generate(ids, max_new_tokens=6), whole)
        with pytest.raises(StepError, match="position 99 is not within"):
            session.position = 99


def test_only_what_is_new_is_trained(llama: Tiny) -> None:
    def trained(head: Any, **settings: Any) -> set[str]:
        model = load_model(llama.checkpoint, LocalChain(llama.parts), head=head, **settings)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trained("causal_lm") == set()
    assert trained("causal_lm", tuning=Tuning(mode="ptune")) == {"model.prompt_embeddings.weight"}
    assert trained("sequence_classification", num_labels=3) == {"score.weight"}


@torch.no_grad()
def test_the_body_alone(tiny: Tiny) -> None:
    model = load_model(tiny.checkpoint, LocalChain(tiny.parts), head="base")
    ours = model(some_ids()).last_hidden_state
    assert_rounded(ours, base_of(tiny.reference.fresh())(some_ids()).last_hidden_state)
    assert model.h is model.blocks
    assert len(model.h) == BLOCKS
    with model.inference_session(max_length=4) as session:
        assert session.step(torch.zeros(1, 4, HIDDEN)).shape == (1, 4, HIDDEN)


def test_what_cannot_be_asked(llama: Tiny) -> None:
    model = client(llama)
    for arguments, says in (
        ({"output_attentions": True}, "attention weights stay with the servers"),
        ({"output_hidden_states": [1]}, "output_hidden_states is True or False"),
        ({"attention_mask": torch.ones(1, 1, 9, 9)}, r"attention_mask must be \(batch, tokens\)"),
    ):
        with pytest.raises(StepError, match=says):
            model(some_ids(1), **arguments)
    with model.inference_session(max_length=20) as session:
        model.generate(some_ids(1), max_new_tokens=2)
        with pytest.raises(StepError, match="began without output_hidden_states"):
            model(some_ids(1)[:, :1], output_hidden_states=True, **{DEFAULT_CACHE_NAME: session.cache})
    with pytest.raises(StepError, match='open the model with tuning_mode="ptune"'):
        model.get_prompt(1)
    with pytest.raises(StepError, match="unknown argument 'num_lables'"):
        client(llama, num_lables=2)
