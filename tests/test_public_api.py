"""The public API: what `from petals import` gives, to programs and to type checkers."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import petals

ROOT = Path(__file__).parents[1]
PROGRAM = """
from __future__ import annotations

import trio
from typing_extensions import assert_type

from petals import (
    AutoDistributedModelForCausalLM, Chat, ClientConfig, ConfigError, DistributedBloomForCausalLM, MissingBlocks,
    Peer, PeerConfig, PetalsError, ServeConfig, SyncPeer, Token, TokenStream, connect, open_peer,
)

ADDR = "/ip4/127.0.0.1/tcp/31337"


async def ask() -> str:
    text = ""
    async with open_peer(PeerConfig(initial_peers=(ADDR,), serve=ServeConfig(blocks=range(2)))) as peer:
        assert_type(peer, Peer)
        stream = await peer.generate(Chat([{"role": "user", "content": "Hello"}]))
        assert_type(stream, TokenStream)
        async for token in stream:
            assert_type(token, Token)
            text += token.text
    return text


def main() -> None:
    try:
        trio.run(ask)
    except MissingBlocks as error:
        assert_type(error.blocks, tuple[int, ...])
    except ConfigError as error:
        assert_type(error.field, str)
    except PetalsError:
        pass
    with connect(ADDR) as peer:
        assert_type(peer, SyncPeer)
        for token in peer.generate("Hello"):
            assert_type(token, Token)
        model = AutoDistributedModelForCausalLM.from_pretrained(
            peer=peer, client_config=ClientConfig(initial_peers=(ADDR,))
        )
        assert_type(model, AutoDistributedModelForCausalLM)
        with model.inference_session(max_length=8) as session:
            assert_type(session.max_length, int)
        print(model.generate(max_new_tokens=3), [each.shape for each in model.parameters()], model.transformer.h[0])
    assert_type(DistributedBloomForCausalLM.from_pretrained("bloom"), DistributedBloomForCausalLM)
"""
MISTAKES = {
    "from petals import open_pear": "open_pear",
    "import petals\npetals.no_such_name": "no_such_name",
    "from petals import ServeConfig\nServeConfig(quant_type='int9')": "quant_type",
    "from petals import PeerConfig\nPeerConfig(initial_peers='/ip4/192.0.2.7/tcp/1')": "initial_peers",
    "from petals import ServeConfig\nServeConfig(cash_bytes=1)": "cash_bytes",
    "from petals import Token\nlen(Token(1, '').id)": "int",
}
CHECKERS = {
    "mypy": ["mypy", "--strict", "--no-error-summary", "--cache-dir", str(ROOT / ".mypy_cache")],
    "pyright": ["pyright", "--pythonpath", sys.executable],
}


def check(checker: str, folder: Path, *programs: str) -> str:
    """What a type checker says of programs outside of the repository, which import what is installed."""
    files = [folder / f"program_{number}.py" for number in range(len(programs))]
    for path, program in zip(files, programs, strict=True):
        path.write_text(program)
    words = [*CHECKERS[checker], *(path.name for path in files)]
    environ = {"MYPYPATH": str(ROOT)} if checker == "mypy" else {}

    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_users_program_has_real_types(checker: str, tmp_path: Path) -> None:
    (tmp_path / "pyrightconfig.json").write_text(f'{{"typeCheckingMode": "standard", "extraPaths": ["{ROOT}"]}}')
    said = check(checker, tmp_path, PROGRAM, *MISTAKES)
    errors = [line for line in said.splitlines() if "error" in line]
    assert not [line for line in errors if "program_0.py" in line], said
    for number, (mistake, named) in enumerate(MISTAKES.items(), start=1):
        lines = [line for line in errors if f"program_{number}.py" in line]
        assert lines, f"{checker} does not see the mistake in: {mistake}"
        assert any(named in line for line in lines) or named in said, lines


def declared() -> dict[str, set[str]]:
    """Module -> names, as type checkers read them in petals/__init__.py."""
    tree = ast.parse((ROOT / "petals" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {node.module or "": {alias.name for alias in node.names} for node in imports}


def test_type_checkers_and_programs_see_the_same_names() -> None:
    names = {module: set(text.split()) for module, text in petals._MODULES.items()}
    assert declared() == names
    assert sorted([*petals._HOMES, "__version__"]) == list(petals.__all__)
    assert len(set(petals.__all__)) == len(petals.__all__)
    assert set(dir(petals)) >= set(petals.__all__)
    for name, module in petals._HOMES.items():
        assert getattr(petals, name) is getattr(importlib.import_module(module), name)


def test_every_error_has_one_root_and_is_public() -> None:
    found = 0
    for module in petals._MODULES.keys() | {"petals.protocols.errors", "petals.models.errors"}:
        for name, value in vars(importlib.import_module(module)).items():
            if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == module:
                assert issubclass(value, petals.PetalsError)
                assert name in petals.__all__
                found += 1
    assert found > 20


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = petals.no_such_name


def test_the_page_lists_every_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in petals.__all__ if name != "__version__" and not re.search(rf"\b{name}\b", page)]
    assert not missing
