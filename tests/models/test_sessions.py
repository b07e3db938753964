"""All ways to step a model are one: generate, the model in a session, past_key_values, its blocks, `session.step`."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.generation import InferenceSession
from petals.models.client.local import LocalChain, LocalSession
from petals.models.client.tuning import Tuning
from petals.models.errors import CacheFull, StepError
from petals.models.library_contract import cache_name
from petals.models.source.loading import load_span
from tests.models.conftest import Tiny
from tests.models.tiny import CASES, Case

TOKENS = 12
PROMPT = 5


def open_client(tiny: Tiny, **settings: Any) -> Any:
    return load_causal_lm(tiny.checkpoint, LocalChain(load_span(tiny.checkpoint, range(4))), **settings)


@pytest.fixture(scope="module")
def two(make_tiny: Callable[[Case], Tiny]) -> list[Tiny]:
    return [make_tiny(next(case for case in CASES if case.id == name)) for name in ("llama", "bloom")]


def text(tiny: Tiny, rows: int = 2) -> Tensor:
    """Greedy tokens of the whole model, prompt in front."""
    prompt = torch.arange(3, 3 + rows * PROMPT).reshape(rows, PROMPT) * 7 % 100 + 3
    made: Tensor = tiny.reference.model.generate(
        prompt, max_new_tokens=TOKENS - PROMPT, do_sample=False, eos_token_id=None
    )
    return made


def pieces(ids: Tensor) -> list[Tensor]:
    """The prompt, then one token after another."""
    return [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)]


Way = Callable[[Any, Tensor, ExitStack], Iterator[Tensor]]


def by_generate(model: Any, ids: Tensor, opened: ExitStack) -> Iterator[Tensor]:
    session = opened.enter_context(model.inference_session(max_length=TOKENS))
    for index, piece in enumerate(pieces(ids)):
        said = model.generate(
            piece if index == 0 else None, max_new_tokens=1, session=session, do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        yield said.logits[0][:, None]


def by_model(model: Any, ids: Tensor, opened: ExitStack) -> Iterator[Tensor]:
    opened.enter_context(model.inference_session(max_length=TOKENS))
    for piece in pieces(ids):
        yield model(piece).logits


def by_past(model: Any, ids: Tensor, opened: ExitStack) -> Iterator[Tensor]:
    past = None
    for piece in pieces(ids):
        output = model(input_ids=piece, past_key_values=past)
        past = output.past_key_values
        yield output.logits


def by_past_with_cache_asked_for(model: Any, ids: Tensor, opened: ExitStack) -> Iterator[Tensor]:
    past = None
    for piece in pieces(ids):
        output = model(input_ids=piece, cache=past, use_cache=True)
        past = output.cache
        yield output.logits


def embedded(model: Any, piece: Tensor) -> Tensor:
    base = model.transformer
    words: Tensor = base.word_embeddings_layernorm(base.word_embeddings(piece))
    return words


def by_blocks(model: Any, ids: Tensor, opened: ExitStack) -> Iterator[Tensor]:
    opened.enter_context(model.transformer.h.inference_session(max_length=TOKENS))
    for piece in pieces(ids):
        yield model.lm_head(model.transformer.ln_f(model.transformer.h(embedded(model, piece))))


def by_slices(model: Any, ids: Tensor, opened: ExitStack) -> Iterator[Tensor]:
    h = model.transformer.h
    opened.enter_context(h.inference_session(max_length=TOKENS))
    for piece in pieces(ids):
        yield model.lm_head(model.transformer.ln_f(h[1:](h[0](embedded(model, piece)))))


def by_step(model: Any, ids: Tensor, opened: ExitStack) -> Iterator[Tensor]:
    session = opened.enter_context(model.transformer.h.inference_session(max_length=TOKENS))
    for piece in pieces(ids):
        yield model.lm_head(model.transformer.ln_f(session.step(embedded(model, piece))))


WAYS: list[Way] = [by_generate, by_model, by_past, by_past_with_cache_asked_for, by_blocks, by_slices, by_step]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@torch.no_grad()
def test_every_way_to_step_is_the_whole_models(two: list[Tiny], way: Way) -> None:
    """With two models open side by side, a step of one after a step of the other."""
    models = [open_client(tiny) for tiny in two]
    texts = [text(tiny) for tiny in two]
    with ExitStack() as opened:
        walks = [way(model, ids, opened) for model, ids in zip(models, texts, strict=True)]
        for end, *steps in zip(range(PROMPT, TOKENS + 1), *walks, strict=True):
            for tiny, ids, logits in zip(two, texts, steps, strict=True):
                expected = tiny.reference.model(ids[:, :end]).logits
                torch.testing.assert_close(logits[:, -1], expected[:, -1], rtol=0, atol=1e-4)


@torch.no_grad()
def test_sessions_of_two_models_do_not_mix(two: list[Tiny]) -> None:
    a, b = (open_client(tiny) for tiny in two)
    ids = text(two[0])[:, :PROMPT]
    with a.inference_session(max_length=20) as mine, b.inference_session(max_length=20) as yours:
        said = a.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(said, two[0].reference.model.generate(ids, max_new_tokens=4, do_sample=False))
        assert (a.active_session, b.active_session) == (mine, yours)
        assert (mine.position, yours.position) == (PROMPT + 3, 0)
        assert a.transformer.h.position == a.transformer.h[1:3].position == PROMPT + 3
        for wrong in (
            lambda: b.generate(max_new_tokens=1, session=mine),
            lambda: b.use_session(mine).__enter__(),
        ):
            with pytest.raises(StepError, match="belongs to the blocks of another model"):
                wrong()
        with a.use_session(None):
            assert a.active_session is None
            assert b.active_session is yours
            assert a(ids).logits.shape[1] == PROMPT
        assert mine.position == PROMPT + 3
    assert a.active_session is None


@torch.no_grad()
def test_the_model_goes_on_where_generate_ended_and_the_other_way_round(two: list[Tiny]) -> None:
    tiny = two[0]
    ids, model = text(tiny), open_client(tiny)
    with model.inference_session(max_length=TOKENS) as session:
        model.generate(ids[:, :PROMPT], max_new_tokens=2, do_sample=False)  # the last token is not sent yet
        model(ids[:, PROMPT + 1 : PROMPT + 3])
        assert torch.equal(session.output_ids, ids[:, : PROMPT + 3])
        more = model.generate(max_new_tokens=2, do_sample=False)
        assert torch.equal(more, ids[:, PROMPT + 3 : PROMPT + 5])
        session.position = PROMPT
        logits = model(ids[:, PROMPT : PROMPT + 2]).logits
        expected = tiny.reference.model(ids[:, : PROMPT + 2]).logits[:, PROMPT:]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        model.transformer.h(torch.zeros(2, 1, model.config.hidden_size))
        with pytest.raises(StepError, match=f"from position {PROMPT + 2} on this session holds hidden states"):
            model.generate(max_new_tokens=1)
        session.position = PROMPT + 2
        assert torch.equal(model.generate(max_new_tokens=1, do_sample=False), ids[:, PROMPT + 2 : PROMPT + 3])


@torch.no_grad()
def test_generate_on_a_session_of_the_blocks_and_from_nothing(two: list[Tiny]) -> None:
    for tiny in two:
        model = open_client(tiny)
        begin = torch.tensor([[model.generation_config.bos_token_id or model.config.bos_token_id]])
        expected = tiny.reference.model.generate(begin, max_new_tokens=6, do_sample=False, eos_token_id=None)
        settings = {"do_sample": False, "eos_token_id": None}
        with model.transformer.h.inference_session(max_length=10) as session:
            first = model.generate(None, max_new_tokens=3, session=session, **settings)
            second = model.generate(max_new_tokens=3, session=session, **settings)
        assert torch.equal(torch.cat([first, second], dim=1), expected)
        assert torch.equal(session.output_ids, expected)
        assert torch.equal(session.last_token_id, expected[:, -1:])
        assert session.num_blocks == 4


@torch.no_grad()
def test_use_cache_is_respected(two: list[Tiny]) -> None:
    tiny, model = two[0], open_client(two[0])
    ids = text(tiny)
    assert model(ids, use_cache=False).past_key_values is None
    with model.inference_session(max_length=TOKENS) as session:
        torch.testing.assert_close(
            model(ids, use_cache=False).logits, tiny.reference.model(ids).logits, rtol=0, atol=1e-4
        )
        assert session.position == 0
        with pytest.raises(StepError, match="leave use_cache=False out"):
            model.generate(ids, max_new_tokens=1, use_cache=False)
    said = model.generate(ids[:, :PROMPT], max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(said, ids[:, : PROMPT + 3])
    model.config.use_cache = False
    assert model(ids).past_key_values is None


def test_a_returned_cache_grows_is_copied_and_takes_part_in_training(two: list[Tiny]) -> None:
    tiny, model = two[0], open_client(two[0], tuning=Tuning(mode="ptune", pre_seq_len=3))
    ids = text(tiny)
    output = model(ids[:, :PROMPT], labels=ids[:, :PROMPT])
    output.loss.backward()
    assert float(model.transformer.prompt_embeddings.weight.grad.abs().sum()) > 0
    past = output.past_key_values
    assert past.session is None, "nothing is reserved for a cache that nobody uses"
    assert past.get_seq_length() == PROMPT
    whole = model(ids).logits.detach()
    with torch.no_grad():
        branch = copy.deepcopy(past)
        for index in range(PROMPT, TOKENS):
            logits = model(ids[:, index : index + 1], past_key_values=past).logits
            torch.testing.assert_close(logits[:, -1], whole[:, index], rtol=0, atol=1e-4)
        long = ids.repeat(1, 9)[:, : 100 - PROMPT]
        model(long, past_key_values=branch)  # longer than its first session
        logits = model(ids[:, :1], past_key_values=branch).logits
        expected = model(torch.cat([ids[:, :PROMPT], long, ids[:, :1]], dim=1)).logits
        torch.testing.assert_close(logits[:, -1], expected[:, -1], rtol=0, atol=1e-4)
        past.crop(-2)
        assert past.get_seq_length() == TOKENS - 2
        logits = model(ids[:, TOKENS - 2 :], past_key_values=past).logits
        torch.testing.assert_close(logits, whole[:, TOKENS - 2 :], rtol=0, atol=1e-4)
        past.reorder_cache(torch.tensor([1, 1]))
        past.crop(-1)
        logits = model(ids[1:, -1:].expand(2, -1), past_key_values=past).logits
        torch.testing.assert_close(logits[:, -1], whole[1:, -1].expand(2, -1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_generate_goes_on_from_a_returned_cache(two: list[Tiny]) -> None:
    tiny, model = two[0], open_client(two[0])
    ids = text(tiny)
    theirs = tiny.reference.model(ids[:, : PROMPT - 1], use_cache=True)
    mine = model(ids[:, : PROMPT - 1]).past_key_values
    name = cache_name(type(tiny.reference.model).forward)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    expected = tiny.reference.model.generate(ids[:, :PROMPT], **{name: getattr(theirs, name)}, **settings)
    assert torch.equal(model.generate(ids[:, :PROMPT], past_key_values=mine, **settings), expected)


@torch.no_grad()
def test_a_search_with_beams_in_a_session_goes_on_from_its_best(two: list[Tiny]) -> None:
    tiny, model = two[0], open_client(two[0])
    ids = text(tiny)[:, :PROMPT]
    search = {"num_beams": 3, "do_sample": False, "eos_token_id": None}
    with model.inference_session(max_length=30) as session:
        first = model.generate(ids, max_new_tokens=4, **search)
        expected = tiny.reference.model.generate(ids, max_new_tokens=4, **search)
        assert torch.equal(first, expected)
        with pytest.raises(StepError, match="beams of a search"):
            model(ids)
        for more in ({"num_beams": 2, "do_sample": False}, {"do_sample": False}):
            known = session.output_ids
            said = model.generate(max_new_tokens=4, eos_token_id=None, **more)
            expected = tiny.reference.model.generate(known, max_new_tokens=4, eos_token_id=None, **more)
            assert torch.equal(torch.cat([known, said], dim=1), expected)


@torch.no_grad()
def test_padding_and_short_masks(two: list[Tiny]) -> None:
    for tiny in two:
        model, ids = open_client(tiny), text(tiny)
        mask = torch.ones(2, PROMPT, dtype=torch.long)
        mask[0, :2] = 0
        cache = DynamicCache()
        name = cache_name(type(tiny.reference.model).forward)
        positions = mask.cumsum(1).sub(1).clamp(min=0)
        first = {"attention_mask": mask} | ({"position_ids": positions} if tiny.case.id == "llama" else {})
        tiny.reference.model(ids[:, :PROMPT], **first, **{name: cache})
        whole = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        then = {"attention_mask": whole}
        if "position_ids" in first:
            then["position_ids"] = whole.sum(1, keepdim=True) - 1
        expected = tiny.reference.model(ids[:, PROMPT : PROMPT + 1], **then, **{name: cache}).logits
        for short in (whole, mask.new_ones(2, 1)):
            with model.inference_session(max_length=TOKENS):
                model(ids[:, :PROMPT], attention_mask=mask)
                logits = model(ids[:, PROMPT : PROMPT + 1], attention_mask=short).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        with model.inference_session(max_length=TOKENS):
            model(ids[:, :PROMPT])
            with pytest.raises(StepError, match="the 1 new tokens or all 6"):
                model(ids[:, PROMPT : PROMPT + 1], attention_mask=mask.new_ones(2, 3))


@torch.no_grad()
def test_mistakes_are_found_before_anything_is_sent(two: list[Tiny]) -> None:
    h = open_client(two[0]).transformer.h
    size = h.chain.hidden_size

    def hidden(*shape: int) -> Tensor:
        return torch.randn(*shape, size)

    with h.inference_session(max_length=4) as session:
        assert h(hidden(1, 0)).shape == (1, 0, size)
        assert session.cache.session is not None, "a step of nothing reserves the room"
        for wrong, says in (
            (lambda: h(hidden(3, 1)), "3 rows, the session 1"),
            (lambda: h(hidden(1, 5)), "do not fit into the session's max_length of 4"),
            (lambda: h(torch.zeros(1, 2, dtype=torch.long)), r"must be \(batch, tokens, "),
            (lambda: h(torch.zeros(1, 1, size, dtype=torch.long)), "must be floating"),
            (lambda: h(hidden(1, 1), hidden(3, 1, 1)), "one for each block"),
            (lambda: h(hidden(1, 1), hypo_ids=torch.tensor([1])), "rows 0 to 0"),
            (lambda: h(hidden(1, 1), lora=object()), "for a whole session"),
        ):
            with pytest.raises(ValueError, match=says):
                wrong()
        assert session.position == 0
    with pytest.raises(StepError, match="is closed"):
        session.step(hidden(1, 1))
    with pytest.raises(StepError, match="hypo_ids reorder the rows of a session"):
        h(hidden(1, 1), hypo_ids=torch.tensor([0]))
    with pytest.raises(TypeError):
        h(hidden(1, 1), None, "swallowed")
    with pytest.raises(TypeError):
        h(hidden(1, 1), atention_mask=None)
    assert h(hidden(1, 0)).shape == (1, 0, size)
    model = open_client(two[0])
    ids = text(two[0])
    with model.inference_session(max_length=TOKENS) as session:
        with pytest.raises(CacheFull, match="5 tokens and 9 new ones do not fit"):
            model.generate(ids[:, :PROMPT], max_new_tokens=9)
        model.generate(ids[:, :PROMPT], max_new_tokens=1)
        with pytest.raises(StepError, match="the session has 2 rows, inputs 1"):
            model.generate(ids[:1], max_new_tokens=1)
        with pytest.raises(StepError, match="not both"):
            model.generate(ids, session=session, past_key_values=session.cache)


@torch.no_grad()
def test_prompts_are_positional_and_of_one_row_for_all(two: list[Tiny]) -> None:
    h = open_client(two[0]).transformer.h
    hidden = torch.randn(2, 3, h.chain.hidden_size, generator=torch.Generator().manual_seed(0))
    prompts = torch.randn(4, 1, 2, h.chain.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = h.chain.forward(hidden, prompts=prompts.expand(-1, 2, -1, -1))
    torch.testing.assert_close(h(hidden, prompts), expected)
    assert float((h(hidden) - expected).abs().max()) > 0.01
    with h.inference_session(max_length=3):
        torch.testing.assert_close(h(hidden, prompts), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_slices_share_the_session_of_their_stack(two: list[Tiny]) -> None:
    h = open_client(two[0]).transformer.h
    hidden = torch.randn(1, 2, h.chain.hidden_size)
    with h[:2].inference_session(max_length=4) as lower, h[2:].inference_session(max_length=4) as upper:
        assert (h[:2].active_session, h[1].active_session, h[3].active_session) == (lower, lower, upper)
        assert h.active_session is None, "neither holds all blocks"
        h[:2](hidden)
        assert (lower.position, upper.position) == (2, 0)
    with h.inference_session(max_length=4) as session:
        middle = h[:2](hidden)
        with pytest.raises(StepError, match="use the same slices at every step"):
            h(hidden)
        h[2:](middle)
        assert session.position == 2
        session.position = 1
        torch.testing.assert_close(h[:2](hidden[:, 1:]), middle[:, 1:], rtol=0, atol=1e-4)


def test_a_module_that_holds_slices_is_copied(two: list[Tiny]) -> None:
    class Adapter(nn.Module):
        def __init__(self, h: Any) -> None:
            super().__init__()
            self.lower, self.upper = h[:2], h[2:]
            self.between = nn.Linear(h.chain.hidden_size, h.chain.hidden_size)

        def forward(self, hidden: Tensor) -> Tensor:
            result: Tensor = self.upper(self.between(self.lower(hidden)))
            return result

    model = Adapter(open_client(two[0]).transformer.h)
    twin = copy.deepcopy(model)
    hidden = torch.randn(1, 2, model.lower.chain.hidden_size)
    torch.testing.assert_close(twin(hidden), model(hidden))
    twin(hidden).sum().backward()
    assert twin.between.weight.grad is not None
    assert model.between.weight.grad is None


def test_a_cache_that_is_dropped_is_given_back(two: list[Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = open_client(two[0]), text(two[0])
    closed: list[Any] = []

    def close(session: LocalSession) -> None:
        closed.append(session)

    monkeypatch.setattr(LocalSession, "close", close)
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
    session = past.session
    assert session is not None
    del past
    gc.collect()
    assert session in closed


@torch.no_grad()
def test_a_session_by_hand_is_no_ones_active_session(two: list[Tiny]) -> None:
    model = open_client(two[0])
    session = model.inference_session(max_length=4)
    assert isinstance(session, InferenceSession)
    assert model.active_session is None
    with model.use_session(session):
        assert model.active_session is session
    session.close()
    session.close()


@torch.no_grad()
def test_every_family_has_the_names_of_the_parts_around_the_blocks(tiny: Tiny) -> None:
    model = open_client(tiny, tuning=Tuning(mode="ptune", pre_seq_len=2))
    base, ids = model.transformer, torch.tensor([[5, 6, 7]])
    words = base.word_embeddings_layernorm(base.word_embeddings(ids))
    assert words.shape[:2] == (1, 3)
    states = torch.randn(1, 3, tiny.checkpoint.hidden_size)
    head = model.lm_head(base.ln_f(states))
    if model.lm_head is model.get_output_embeddings():  # a family's own part of that name stays what it is
        assert head.shape == (1, 3, model.config.vocab_size)
    else:
        assert tiny.case.id == "modernbert-decoder"
    assert len(base.h) == tiny.checkpoint.num_blocks
    assert base.get_prompt(3)[0].shape[:2] == (3, 2)
