"""The example that Petals was born with, as docs/client.md quotes it, on a tiny BLOOM in a local directory."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from petals.peer.client_config import INITIAL_PEERS
from tests.models.tiny import CASES, save_tiny
from tests.swarm.conftest import Swarm

PAGE = (Path(__file__).parents[2] / "docs" / "client.md").read_text()


async def test_it_runs_as_written(
    make_swarm: Callable[..., Swarm],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_tiny(next(case for case in CASES if case.id == "bloom"), tmp_path)
    swarm = make_swarm(tmp_path)
    await swarm.add(range(2))
    await swarm.add(range(2, 4))
    monkeypatch.setenv(INITIAL_PEERS, swarm.peers[0].addrs[0])
    program = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert program is not None
    code = program[1].replace("bigscience/bloom-petals", str(tmp_path))
    words = {word: index for index, word in enumerate(["<unk>", "A", "cat", "sat", *map(str, range(195))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    batch = torch.tensor([[1, 2, 3, 9], [4, 5, 6, 7]])
    losses: list[float] = []

    def recorded(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        losses.append(float(loss.detach()))
        return loss

    names: dict[str, Any] = {
        "torch": torch,
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=tokenizer),
        "data_loader": [(batch, batch)] * 3,
        "cross_entropy": recorded,
    }
    before = threading.active_count()
    await trio.to_thread.run_sync(exec, code, names)
    assert capsys.readouterr().out.startswith("A cat sat")
    assert losses[0] > losses[-1]
    assert names["model"].transformer.prompt_embeddings.weight.shape == (16, 32)
    assert threading.active_count() > before  # the background peer lives on, for the next model
