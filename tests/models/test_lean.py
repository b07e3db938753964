"""The lean way through blocks gives what the library's gives, whoever shares the pass."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from petals.models.blocks import lean
from petals.models.blocks.block import BlockSpan
from petals.models.blocks.cache import SpanCache
from petals.models.blocks.passes import PASS_ROWS
from petals.models.errors import StepError
from petals.models.kernels import small_matmul
from petals.models.source.loading import load_span
from tests.models.conftest import Tiny, load_stock
from tests.models.tiny import BLOCKS, CASES, HIDDEN, Case
from tests.tolerance import assert_rounded

LEAN = {"bloom", "llama", "llama3-rope", "mistral", "qwen2", "qwen3"}
MakeTiny = Callable[[Case], Tiny]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=sorted(LEAN))
def lean_tiny(request: pytest.FixtureRequest, make_tiny: MakeTiny) -> Tiny:
    return make_tiny(next(case for case in CASES if case.id == request.param))


def test_which_families_have_it(tiny: Tiny) -> None:
    assert tiny.whole.lean == (tiny.case.id in LEAN)


def play(span: BlockSpan, seed: int, *, together: bool) -> list[Tensor]:
    """Sessions of different ranges, batches, lengths and paddings step in random company; all that they answered."""
    dice = random.Random(seed)
    ranges = [range(BLOCKS), range(1, BLOCKS), range(2), range(1, 3)]
    sessions = [
        Played(cache := span.new_cache(dice.choice(ranges), dice.choice((1, 1, 2, 3)), 24), padding(dice, cache))
        for _ in range(5)
    ]
    for turn in range(12):
        steps = []
        for index, session in enumerate(sessions):
            cache = session.cache
            if dice.random() < 0.3:
                continue
            if cache.position > 4 and dice.random() < 0.2:
                cache.rollback(cache.position - dice.randrange(1, 4))
            tokens = min(dice.choice((1, 1, 1, 2, 5)), cache.max_length - cache.position)
            if tokens:
                hidden = 0.5 * noise(100 * turn + index, cache.batch_size, tokens, HIDDEN)
                steps.append((session, hidden, cache, session.mask_of(tokens)))
        if together:
            joint = [step for step in steps if span.can_join(*step[1:])]
            outputs = span.step_together(*([step[part] for step in joint] for part in (1, 2, 3)))
            for (session, _, _, mask), output in zip(joint, outputs, strict=True):
                session.note(output, mask)
            steps = [step for step in steps if not any(step is one for one in joint)]
        for session, hidden, cache, mask in steps:
            session.note(span.step(hidden, cache, attention_mask=mask), mask)
    return [answer for session in sessions for answer in session.answers]


@dataclass
class Played:
    """A session, and the tokens at the beginning of each row that are padding; None: it never says anything of them."""

    cache: SpanCache
    padding: Tensor | None
    answers: list[Tensor] = field(default_factory=list)

    def mask_of(self, tokens: int) -> Tensor | None:
        if self.padding is None:
            return None
        return (torch.arange(self.cache.position + tokens) >= self.padding[:, None]).long()

    def note(self, output: Tensor, mask: Tensor | None) -> None:
        self.answers.append(output if mask is None else output[mask[:, -output.shape[1] :].bool()])


def padding(dice: random.Random, cache: SpanCache) -> Tensor | None:
    if dice.random() < 0.4:
        return None
    return torch.tensor([dice.randrange(4) for _ in range(cache.batch_size)])


def assert_near(ours: list[Tensor], truth: list[Tensor], share: float) -> None:
    """No difference is more than `share` of the largest value."""
    for mine, wanted in zip(ours, truth, strict=True):
        if wanted.numel():  # nothing but padding otherwise
            assert_close(mine, wanted, rtol=0, atol=share * float(wanted.abs().max()))


@pytest.mark.parametrize("seed", range(6))
def test_sessions_in_company(lean_tiny: Tiny, seed: int) -> None:
    span = lean_tiny.whole
    with span.library_path():
        truth = play(span, seed, together=False)
    assert_near(play(span, seed, together=True), truth, 1e-4)
    assert_near(play(span, seed, together=False), truth, 1e-4)


def test_int8(make_tiny: MakeTiny, llama: Tiny) -> None:
    """Integer products do not know their neighbours: the same bits in any company."""
    span = load_span(llama.checkpoint, range(BLOCKS), quant_type="int8")
    assert span.lean
    with span.library_path():
        truth = play(span, 3, together=False)
    assert_near(play(span, 3, together=True), truth, 2e-2)
    span_cache, other = span.new_cache(range(BLOCKS), 1, 8), span.new_cache(range(BLOCKS), 1, 8)
    hidden = noise(5, 2, 1, HIDDEN)
    alone = span.step(hidden[:1], span_cache)
    span_cache.rollback(0)
    assert torch.equal(span.step_together([hidden[:1], hidden[1:]], [span_cache, other])[0], alone)


def test_half_precision_rounds_where_the_library_rounds(lean_tiny: Tiny) -> None:
    span = load_span(lean_tiny.checkpoint, range(BLOCKS), dtype=torch.bfloat16)
    assert span.lean
    with span.library_path():
        truth = play(span, 4, together=False)
    assert_near(play(span, 4, together=False), truth, 3e-2)


def test_a_large_step_or_one_beyond_the_window_goes_the_librarys_way(make_tiny: MakeTiny, llama: Tiny) -> None:
    span = llama.whole
    cache = span.new_cache(range(BLOCKS), 2, PASS_ROWS)
    assert span.can_join(noise(0, 2, PASS_ROWS // 2, HIDDEN), cache)
    assert not span.can_join(noise(0, 2, PASS_ROWS // 2 + 1, HIDDEN), cache)
    mistral = make_tiny(next(case for case in CASES if case.id == "mistral")).whole
    cache = mistral.new_cache(range(BLOCKS), 1, 9)
    mistral.step(noise(0, 1, 4, HIDDEN), cache)
    assert mistral.can_join(noise(0, 1, 1, HIDDEN), cache)
    assert not mistral.can_join(noise(0, 1, 2, HIDDEN), cache)


def test_padding_joins_unless_it_is_new(lean_tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    span = lean_tiny.whole
    cache = span.new_cache(range(BLOCKS), 2, 8)
    hidden, mask = noise(0, 2, 3, HIDDEN), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert not span.can_join(hidden, cache, mask[:, :3])
    span.step(hidden, cache, attention_mask=mask[:, :3])
    assert span.can_join(hidden[:, :1], cache, mask)
    monkeypatch.setattr(span, "_run", lambda *_: pytest.fail("the library's way"))
    padded = span.step(hidden[:, :1], cache, attention_mask=mask)
    cache.rollback(3)
    whole = span.step(hidden[:, :1], cache)
    assert not torch.allclose(padded[0], whole[0])
    assert_close(padded[1], whole[1])


def test_a_mask_that_does_not_fit_changes_nothing(llama: Tiny) -> None:
    span = llama.whole
    caches = [span.new_cache(range(BLOCKS), 1, 8) for _ in range(2)]
    hidden = [noise(0, 1, 1, HIDDEN)] * 2
    with pytest.raises(StepError, match="attention_mask"):
        span.step_together(hidden, caches, [None, torch.ones(1, 2, dtype=torch.int64)])
    assert [cache.position for cache in caches] == [0, 0]


def test_stacked_weights_take_no_more_memory(llama: Tiny) -> None:
    attention: Any = load_stock(llama.checkpoint, range(1)).layers()[0].self_attn
    q, k, v = (getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj"))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert q.untyped_storage().nbytes() == q.nbytes + k.nbytes + v.nbytes


def test_a_path_that_differs_is_not_taken(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lean, "_rotate", lambda x, cos, sin: None)
    span = load_span(llama.checkpoint, range(BLOCKS))
    assert not span.lean
    assert "lean path differs" in caplog.text
    hidden = noise(1, 1, 3, HIDDEN)
    cache = span.new_cache(range(BLOCKS), 1, 3)
    assert_rounded(span.step(hidden, cache), llama.whole.forward(hidden, range(BLOCKS)))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 64, 65])
@pytest.mark.parametrize(("features", "biased"), [((48, 64), True), ((33, 65), False)])
def test_every_way_multiplies(
    rows: int, features: tuple[int, int], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = noise(1, features[1], features[0]), noise(2, rows, features[0])
    bias = noise(3, features[1]) if biased else None
    expected = F.linear(x, weight, bias)
    ways = [small_matmul._other_way_round, *([small_matmul._in_parts] if features[1] % 2 == 0 else [])]
    with threads(2):
        assert_close(small_matmul.dense_product(x, weight, bias), expected)
        for way in ways:
            monkeypatch.setattr(small_matmul, "_FASTEST", {})
            monkeypatch.setattr(small_matmul, "_fastest", lambda *_, way=way: way)
            assert_close(small_matmul.dense_product(x, weight, bias), expected)


def test_a_head_for_few_rows() -> None:
    linear = nn.Linear(16, 33)
    linear.__class__ = small_matmul.FewRowsLinear
    hidden = noise(1, 2, 3, 16)
    expected = F.linear(hidden, linear.weight, linear.bias)
    with torch.no_grad():
        assert_close(linear(hidden), expected)
    (gradient,) = torch.autograd.grad(linear(hidden.requires_grad_()).sum(), hidden)
    assert_close(gradient, linear.weight.sum(0).expand_as(hidden))
