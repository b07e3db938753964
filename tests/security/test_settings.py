"""A checkpoint's settings are a stranger's: they choose tokens, and no code."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from petals.models.errors import CheckpointError
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from petals.models.source.settings import check_tokenizer, is_tame
from tests.models.tiny import CASES, save_tiny


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_tiny(next(case for case in CASES if case.id == "llama"), tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | changes))


EVIL = "kernels-community/evil"


def test_no_kernel_is_loaded_from_a_hub(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("a kernel was loaded")

    monkeypatch.setattr(
        "transformers.modeling_utils.PreTrainedModel._check_and_adjust_attn_implementation", loaded, raising=False
    )
    monkeypatch.undo()
    for name in ("load_and_register_attn_kernel", "get_kernel"):
        monkeypatch.setattr(f"transformers.integrations.hub_kernels.{name}", loaded, raising=False)
    edit(
        directory / "config.json",
        attn_implementation=EVIL,
        _attn_implementation=EVIL,
        experts_implementation=EVIL,
        use_kernels=True,
        use_cache=False,
        output_hidden_states=True,
        return_dict=False,
    )
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(directory)
    assert len([record for record in caplog.records if "config.json" in record.getMessage()]) == 1
    assert EVIL in caplog.text
    config = checkpoint.config
    assert EVIL not in str(vars(config))
    assert (config.use_cache, config.output_hidden_states) == (True, False)
    span = load_span(checkpoint, range(checkpoint.num_blocks))
    assert span.hidden_size


def test_plain_settings_are_as_they_were(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(directory / "config.json", attn_implementation="eager", use_cache=True)
    with caplog.at_level(logging.WARNING):
        assert open_checkpoint(directory).config._attn_implementation == "eager"
    assert not caplog.records


TAME = [
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"\p{N}{1,3}(?=(?:\p{N}{3})*\b)",
]
WILD = ["(a+)+$", "(a|a)*b", r"(?:\s*\w+)*x", "((ab)*c*)+d", "(?:a|aa){2,}$", "x" * 5000]


@pytest.mark.parametrize("pattern", TAME)
def test_patterns_of_real_tokenizers_are_taken(pattern: str) -> None:
    assert is_tame(pattern)


@pytest.mark.parametrize("pattern", WILD, ids=range(len(WILD)))
def test_patterns_that_explode_are_not(pattern: str, tmp_path: Path) -> None:
    re.compile(pattern)
    assert not is_tame(pattern)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    written = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match="could take for ever"):
        check_tokenizer("tiny", tmp_path)
