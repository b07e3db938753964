"""Sessions share passes through the library's own layers, and get what each gets alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from petals.models.blocks import joint
from petals.models.blocks.adapters import Lora, LowRank
from petals.models.blocks.block import BlockSpan
from petals.models.blocks.passes import PASS_ROWS
from petals.models.errors import StepError, UnsupportedModel
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span, share_layers
from tests.models.conftest import Tiny
from tests.models.test_lean import LEAN, assert_near, noise, play
from tests.models.tiny import BLOCKS, CASES, HIDDEN, Case, save_tiny
from tests.tolerance import assert_rounded

STATES = {"qwen3-next", "qwen3.5", "granite-hybrid", "falcon-h1", "lfm2"}
ALONE = {"falcon-new", "falcon-7b", "falcon-rw", "mpt", "llama4", "deepseek-v3", "deepseek-v32"} | STATES
"""They do their attention in a way of their own, or keep more than keys and values."""
JOINT = {case.id for case in CASES} - LEAN - ALONE
MakeTiny = Callable[[Case], Tiny]


def tiny_of(make_tiny: MakeTiny, name: str) -> Tiny:
    return make_tiny(next(case for case in CASES if case.id == name))


@pytest.fixture(params=sorted(JOINT))
def span(request: pytest.FixtureRequest, make_tiny: MakeTiny) -> BlockSpan:
    return tiny_of(make_tiny, request.param).whole


def test_which_families_share_passes(tiny: Tiny) -> None:
    assert tiny.whole.joins == (tiny.case.id not in ALONE)


@pytest.mark.parametrize("seed", range(6))
def test_sessions_in_company(span: BlockSpan, seed: int) -> None:
    with span.library_path():
        truth = play(span, seed, together=False)
    assert_near(play(span, seed, together=True), truth, 1e-4)


def test_alone_the_library_is_asked_as_ever(span: BlockSpan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint.Joint, "run", lambda *_: pytest.fail("a pass for nobody else"))
    with span.library_path():
        truth = play(span, 1, together=False)
    for mine, wanted in zip(play(span, 1, together=False), truth, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("family", ["olmo2", "mixtral"])
def test_quantised_blocks_share_passes(make_tiny: MakeTiny, family: str) -> None:
    span = load_span(tiny_of(make_tiny, family).checkpoint, range(BLOCKS), quant_type="int8")
    assert span.joins
    with span.library_path():
        truth = play(span, 3, together=False)
    assert_near(play(span, 3, together=True), truth, 2e-2)


def test_half_precision(make_tiny: MakeTiny) -> None:
    span = load_span(tiny_of(make_tiny, "olmo2").checkpoint, range(BLOCKS), dtype=torch.bfloat16)
    assert span.joins
    with span.library_path():
        truth = play(span, 4, together=False)
    assert_near(play(span, 4, together=True), truth, 5e-2)


def test_a_pass_takes_no_more_rows_than_it_may(make_tiny: MakeTiny) -> None:
    span = tiny_of(make_tiny, "gemma2").whole
    cache = span.new_cache(range(BLOCKS), 2, PASS_ROWS)
    assert span.can_join(noise(0, 2, PASS_ROWS // 2, HIDDEN), cache)
    assert not span.can_join(noise(0, 2, PASS_ROWS // 2 + 1, HIDDEN), cache)


def test_other_threads_run_the_model_as_it_was(make_tiny: MakeTiny) -> None:
    """One thread shares passes while another runs single sessions, which use the same modules' weights."""
    span = tiny_of(make_tiny, "gemma3").whole
    with span.library_path():
        truth = play(span, 5, together=False)
    answers: dict[bool, list[list[Tensor]]] = {True: [], False: []}

    def run(together: bool) -> None:
        answers[together] = [play(span, 5, together=together) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(together,)) for together in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine in answers[True]:
        assert_near(mine, truth, 1e-4)
    for mine in answers[False]:
        for one, wanted in zip(mine, truth, strict=True):
            assert_close(one, wanted, rtol=0, atol=0)


def adapter_of(span: BlockSpan, seed: int) -> Lora:
    """An update of every linear layer."""
    generator = torch.Generator().manual_seed(seed)

    def lively(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    return Lora(
        f"adapter {seed}",
        {
            (block, path): LowRank(lively(2, wide), lively(high, 2), 0.5)
            for block in span.blocks
            for path, (wide, high) in span.linear_features(block).items()
        },
    )


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2", "gemma3", "mixtral"])
def test_each_session_has_its_own_adapter_or_none(make_tiny: MakeTiny, family: str) -> None:
    tiny = tiny_of(make_tiny, family)
    span = load_span(tiny.checkpoint, range(BLOCKS))
    hosted, own = adapter_of(span, 1), adapter_of(span, 2)
    span.add_adapter(hosted)
    if span.lean:
        assert not span.can_join(noise(0, 1, 1, HIDDEN), span.new_cache(range(BLOCKS), 1, 4), None, hosted.name)
        share_layers(span, tiny.checkpoint)
    adapters = [None, hosted.name, own, None, hosted.name]
    ranges = [range(BLOCKS), range(BLOCKS), range(1, BLOCKS), range(2), range(1, 3)]
    caches, alone = ([span.new_cache(blocks, 1 + i % 2, 8) for i, blocks in enumerate(ranges)] for _ in range(2))
    for turn, tokens in enumerate((2, 1, 3)):
        hidden = [noise(10 * turn + i, cache.batch_size, tokens, HIDDEN) for i, cache in enumerate(caches)]
        assert all(
            span.can_join(rows, cache, None, lora) for rows, cache, lora in zip(hidden, caches, adapters, strict=True)
        )
        with span.library_path():
            truth = [span.step(*given, adapter=lora) for *given, lora in zip(hidden, alone, adapters, strict=True)]
        assert_near(span.step_together(hidden, caches, None, adapters), truth, 1e-4)
    assert span._applied.shares == ()


def test_an_adapter_that_is_not_here_costs_nobody_a_step(make_tiny: MakeTiny) -> None:
    span = tiny_of(make_tiny, "olmo2").whole
    caches = [span.new_cache(range(BLOCKS), 1, 4) for _ in range(2)]
    with pytest.raises(StepError, match="no adapter"):
        span.step_together([noise(0, 1, 1, HIDDEN)] * 2, caches, None, [None, "nobody's"])
    assert [cache.position for cache in caches] == [0, 0]


def test_weights_are_shared_and_the_configuration_is_not(make_tiny: MakeTiny) -> None:
    span = load_span(tiny_of(make_tiny, "mixtral").checkpoint, range(BLOCKS))
    assert span._joint is not None
    ours, theirs = span._joint._twin, span._model
    assert {id(weight) for weight in ours.parameters()} == {id(weight) for weight in theirs.parameters()}
    assert theirs.config._attn_implementation != joint.NAME == ours.config._attn_implementation


def test_passes_that_differ_are_not_shared(make_tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_of(make_tiny, "gpt-neox")
    monkeypatch.setattr(joint, "positions", lambda parts, device: torch.zeros(sum(p.rows for p in parts)).long())
    span = load_span(tiny.checkpoint, range(BLOCKS))
    assert not span.joins
    hidden = noise(1, 1, 3, HIDDEN)
    cache = span.new_cache(range(BLOCKS), 1, 3)
    assert not span.can_join(hidden, cache)
    assert_rounded(span.step(hidden, cache), tiny.whole.forward(hidden, range(BLOCKS)))


def test_a_pass_that_breaks_forgets_what_it_has_written(make_tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    span = tiny_of(make_tiny, "phi3").whole
    caches = [span.new_cache(range(BLOCKS), 1, 8) for _ in range(2)]
    hidden = [noise(seed, 1, 3, HIDDEN) for seed in (1, 2)]
    truth = span.step_together(hidden, caches)
    for cache in caches:
        cache.rollback(0)
    of_part = joint._of_part
    calls = iter(range(100))

    def breaks(tensor: Tensor, part: object) -> Tensor:
        if next(calls) == 3 * 2 * 2 + 1:  # in the third block: three tensors of two sessions each
            raise RuntimeError("out of memory, say")
        return of_part(tensor, part)  # type: ignore[arg-type]

    monkeypatch.setattr(joint, "_of_part", breaks)
    with pytest.raises(RuntimeError, match="say"):
        span.step_together(hidden, caches)
    assert [cache.position for cache in caches] == [0, 0]
    assert all(cache.layer(block).length == 0 for cache in caches for block in range(BLOCKS))
    monkeypatch.setattr(joint, "_of_part", of_part)
    for again, wanted in zip(span.step_together(hidden, caches), truth, strict=True):
        assert torch.equal(again, wanted)


def test_a_stranger_is_not_trusted_with_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that are not made by causality and windows alone may look right for six tokens: only known families."""
    from petals.models import families

    case = next(case for case in CASES if case.id == "olmo2")
    save_tiny(case, tmp_path)
    monkeypatch.delitem(families._FAMILIES, "olmo2")
    assert not load_span(open_checkpoint(tmp_path), range(BLOCKS)).joins


def test_attention_outside_a_pass_is_refused(make_tiny: MakeTiny) -> None:
    span = tiny_of(make_tiny, "gpt2").whole
    assert span._joint is not None
    with pytest.raises((UnsupportedModel, AssertionError)):
        span._joint._twin(inputs_embeds=noise(0, 1, 2, HIDDEN), use_cache=False)
