"""The decode loop says token for token what `transformers.generate` says, whatever the settings ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.decoding import Draw, Rules, criteria_of, decode, greedy, ignored_settings, processors_of
from petals.models.client.drafts import DraftPolicy, TextDrafter
from petals.models.client.generation import ChainCache
from petals.models.client.local import LocalChain
from tests.models.conftest import Tiny
from tests.models.tiny import VOCABULARY

NEW = 9
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "sequence_bias": [[[5], 2.0]]},
    "lengths": {"eos_token_id": list(range(2, 90)), "min_new_tokens": 4, "exponential_decay_length_penalty": (3, 1.5)},
    "min length": {"eos_token_id": list(range(2, 150)), "min_length": 12},
    "forced": {"forced_eos_token_id": 7, "eos_token_id": 7, "forced_bos_token_id": 3},
    "forbidden": {"bad_words_ids": [[9], [4, 5]], "suppress_tokens": [11, 12], "begin_suppress_tokens": [20, 21]},
    "clean": {"remove_invalid_values": True, "renormalize_logits": True},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "defaults": {},
    "narrow": {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "all tokens": {"top_k": 0, "temperature": 1.3},
    "odd": {"top_k": 0, "min_p": 0.01, "typical_p": 0.95, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4},
}


def prompt(length: int = 7) -> Tensor:
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(11))


def ours(
    tiny: Tiny, ids: Tensor, config: GenerationConfig, seed: int | None = None, drafter: TextDrafter | None = None
) -> Tensor:
    model = load_causal_lm(tiny.checkpoint, LocalChain(tiny.parts))
    eos = config.eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    length = ids.shape[1]
    said: list[int] = []
    with ChainCache(model.blocks.chain, length + NEW).closing() as cache:
        text = decode(
            model,
            cache,
            ids,
            max_new_tokens=NEW,
            rules=Rules(
                processors_of(config, prompt_length=length, max_length=length + NEW, ends=ends),
                criteria_of(config, ends=ends, tokenizer=None),
                Draw(seed) if config.do_sample else greedy,
            ),
            on_token=said.append,
            drafter=drafter,
        )
    assert text[0, length:].tolist() == said
    return text


def theirs(tiny: Tiny, ids: Tensor, config: GenerationConfig, seed: int = 0) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        answer: Tensor = tiny.reference.fresh().generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, max_new_tokens=NEW
        )
    return answer


def test_greedy_and_seeded_answers_of_every_family(tiny: Tiny) -> None:
    """The tiny models' texts cross a sliding window and, with longrope, the length that changes frequencies."""
    for config in (GenerationConfig(), GenerationConfig(do_sample=True)):
        expected = theirs(tiny, prompt(), config, seed=3)
        assert torch.equal(ours(tiny, prompt(), config, seed=3), expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_model_are_followed(llama: Tiny, name: str) -> None:
    config = GenerationConfig(**SETTINGS[name])
    length = 1 if name == "forced" else 7
    assert torch.equal(ours(llama, prompt(length), config), theirs(llama, prompt(length), config))


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("seed", [1, 2])
def test_draws_are_those_of_the_library(llama: Tiny, name: str, seed: int) -> None:
    config = GenerationConfig(do_sample=True, **SAMPLING[name])
    assert torch.equal(ours(llama, prompt(), config, seed), theirs(llama, prompt(), config, seed))


@pytest.mark.parametrize("config", [GenerationConfig(), GenerationConfig(do_sample=True)], ids=["greedy", "sampling"])
def test_drafts_change_the_steps_and_not_the_tokens(tiny: Tiny, config: GenerationConfig) -> None:
    """A prompt that repeats itself, so that something is always drafted, and most of it is wrong."""
    ids = prompt(4).repeat(1, 4)
    drafter = TextDrafter(DraftPolicy(mode="always"), lambda: 0.0)
    assert torch.equal(ours(tiny, ids, config, 3, drafter), theirs(tiny, ids, config, 3))
    assert (drafter.policy.drafted > 0) != ("dynamic" in tiny.case.id or "longrope" in tiny.case.id)


def test_right_drafts_save_steps(llama: Tiny) -> None:
    """A model that says one word for ever is guessed after three of them."""
    biased = GenerationConfig(sequence_bias=[[[5], 1000.0]])
    drafter = TextDrafter(DraftPolicy(mode="always"), lambda: 0.0)
    text = ours(llama, prompt(), biased, drafter=drafter)
    assert torch.equal(text, theirs(llama, prompt(), biased))
    assert drafter.policy.accepted + drafter.policy.steps == NEW
    assert drafter.policy.steps < NEW / 2


def test_without_a_seed_draws_differ(llama: Tiny) -> None:
    config = GenerationConfig(do_sample=True, top_k=0, temperature=5.0)
    answers = {tuple(ours(llama, prompt(), config)[0].tolist()) for _ in range(3)}
    assert len(answers) > 1  # 18 draws from nearly 199 equal chances: three equal answers have a chance below 1e-30


def test_what_a_stream_leaves_out_is_named() -> None:
    assert ignored_settings(GenerationConfig()) == []
    asked = GenerationConfig(num_beams=4, num_return_sequences=2, prompt_lookup_num_tokens=3, penalty_alpha=0.6)
    assert ignored_settings(asked) == [
        "num_beams=4",
        "num_return_sequences=2",
        "penalty_alpha=0.6",
        "prompt_lookup_num_tokens=3",
    ]
