"""The self-check of the client finds every family right with this library, and a changed library wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from petals.models.client import client_check
from petals.models.client.causal_lm import _build_small, load_causal_lm
from petals.models.client.client_check import check_client
from petals.models.client.distributed import head_class_of
from petals.models.client.generation import ChainCache
from petals.models.client.local import LocalChain
from petals.models.client.miniature import miniature
from petals.models.errors import UnsupportedLibrary
from petals.models.families import families
from tests.models.conftest import Tiny
from tests.models.tiny import CASES, Case


@pytest.fixture(autouse=True)
def _nothing_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PETALS_CACHE", str(tmp_path))
    monkeypatch.setattr(client_check, "_checked", set())


def check(config: PretrainedConfig) -> None:
    check_client(config, head_class_of(config, "causal_lm"), _build_small)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_family_has_a_miniature_of_its_own_that_is_right(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    pair_of = client_check._pair_of

    def noted(config: PretrainedConfig, *rest: Any) -> Any:
        made.append(config.model_type)
        return pair_of(config, *rest)

    monkeypatch.setattr(client_check, "_pair_of", noted)
    check(case.config())
    assert made == [case.model_type]


def test_all_verified_families_are_among_them() -> None:
    assert {family.model_type for family in families() if family.verified} <= {case.model_type for case in CASES}


def test_a_verdict_is_kept_and_asked_once(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_causal_lm(llama.checkpoint, LocalChain(llama.parts))
    (kept,) = tmp_path.glob("checked/llama-*.json")
    assert "roll-back" in kept.read_text()
    monkeypatch.setattr(client_check, "_checked", set())
    monkeypatch.setattr(client_check, "_make_pair", lambda *_: pytest.fail("checked again"))
    load_causal_lm(llama.checkpoint, LocalChain(llama.parts))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda cache, ids: setattr(cache, "get_seq_length", lambda layer_idx=0: 0), "greedy"),
        (lambda cache, ids: setattr(cache, "keep", lambda tokens: None), "roll-back"),
    ],
    ids=["cache length unknown", "roll-back without effect"],
)
def test_a_library_that_went_another_way_is_refused_by_name(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None], said: str
) -> None:
    begin = ChainCache.__init__

    def spoiled(self: ChainCache, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        fault(self, torch.empty(0))

    monkeypatch.setattr(ChainCache, "__init__", spoiled)
    with pytest.raises(UnsupportedLibrary, match=rf"^transformers [\d.]+ generates other tokens .*checked: {said}"):
        check(llama.checkpoint.config)


def test_a_family_that_cannot_be_made_small_is_checked_with_llama(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(config: PretrainedConfig) -> PretrainedConfig:
        if config.vocab_size == llama.checkpoint.config.vocab_size:
            raise ValueError("sizes of its own")
        return miniature(config)

    monkeypatch.setattr(client_check, "miniature", fails)
    check(llama.checkpoint.config)
