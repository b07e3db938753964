"""One family of each kind from checkpoint to client, compared with the library's own model in six ways.

All decoders of the installed library: `python scripts/family_table.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from family_table import CHECKS, Verdict, judge, section

KINDS = (
    "bamba",
    "glm_moe_dsa",
    "jamba",  # whose state spaces take one token at a time
    "kimi_linear",
    "mamba2",  # no keys and values at all
    "nemotron_h",  # blocks that keep nothing
    "olmo_hybrid",
)


@pytest.mark.parametrize("model_type", KINDS)
def test_it_is_exact_from_checkpoint_to_client(model_type: str) -> None:
    verdict = judge(model_type)
    assert verdict.refused is None
    assert verdict.held == tuple(check.__name__ for check in CHECKS), verdict.failed


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("recurrent_gemma", "keep what they remember in themselves"), ("minimax", "uses cache of its own")],
)
def test_what_cannot_be_exact_is_refused(model_type: str, why: str) -> None:
    verdict = judge(model_type)
    assert why in (verdict.refused or "")


def test_the_section_says_what_held() -> None:
    verdicts = [
        Verdict("good", ("greedy",), ()),
        Verdict("half", ("greedy",), ("beams",)),
        Verdict("bad", (), (), "UnsupportedModel: tmpab12 (bad) cannot be served: a | b; see docs/custom-model.md"),
    ]
    text = section(verdicts)
    assert "1 of 3 are exact in all six ways:\n`good`." in text
    assert "| `half` | differs in: beams |" in text
    assert "| `bad` | a / b |" in text
