"""The commands of docs/weights.md run as they stand there, but for names and throughput."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from petals.cli import main
from petals.models.source.checkpoint import MANIFEST, open_checkpoint
from tests.cli import test_commands
from tests.models.tiny import CASES, save_tiny

PAGE = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
FIRST, SECOND, SEAL = (
    command for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for command in block.splitlines()
)


@contextmanager
def serving(command: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[dict[str, Any]]:
    monkeypatch.setattr(test_commands, "ENVIRONMENT", test_commands.ENVIRONMENT | {"PETALS_CACHE": str(cache)})
    words = [word for word in shlex.split(command)[1:] if word != "--json"]
    with test_commands.serving(*words, "--throughput", "100") as peer:
        yield peer


def test_a_peer_with_an_empty_cache_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    save_tiny(next(case for case in CASES if case.id == "llama"), model)
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    with serving(FIRST.replace("MODEL", str(model)), monkeypatch, tmp_path / "first") as first:
        second = SECOND.replace("DIGEST", first["digest"]).replace("ADDR", first["addrs"][0])
        with serving(second, monkeypatch, tmp_path / "second") as joined:
            assert (joined["digest"], joined["model"], joined["blocks"]) == (first["digest"], "model", [2, 4])
    fetched = tmp_path / "second" / "fetched" / first["digest"]
    assert sorted(path.name for path in fetched.glob("*.safetensors")) == [
        "block-00002.safetensors",
        "block-00003.safetensors",
    ]


def test_seal_prints_the_digest_that_the_model_has_from_now_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(next(case for case in CASES if case.id == "llama"), tmp_path)
    before = open_checkpoint(tmp_path).digest
    words = shlex.split(SEAL.replace("DIR", str(tmp_path)))[1:]
    assert main.run(main.parse(words)) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == open_checkpoint(tmp_path).digest != before
    assert (tmp_path / MANIFEST).stat().st_mode & 0o777 == 0o644
    assert main.run(main.parse(["seal", str(tmp_path / "nowhere")])) == 2
    assert "there is no directory" in capsys.readouterr().err
