"""The committed protobuf code is what the .proto files say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("source", ["petals/protocols/messages", "petals/dht/records"])
def test_generated_code_is_fresh(source: str, tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", "-I", ".",
            f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"{source}.proto",
        ],
        check=True,
        cwd=ROOT,
    )  # fmt: skip
    for ending in ("_pb2.py", "_pb2.pyi"):
        fresh = (tmp_path / (source + ending)).read_text()
        committed = (ROOT / (source + ending)).read_text()
        # the comment with the compiler's version aside: another patch release makes the same code
        assert _without_versions(fresh) == _without_versions(committed), f"regenerate {source}{ending}"


def _without_versions(code: str) -> list[str]:
    lines = code.splitlines()
    return [line for line in lines if not line.startswith("# Protobuf Python Version") and not line.strip().isdigit()
            and not line.strip().rstrip(",").isdigit()]  # fmt: skip
