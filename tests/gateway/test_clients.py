"""Other people's clients, with their real packages, against a peer whose model is scripted at the level of tokens.

They live in an environment of their own, which scripts/clients makes: build/clients.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import trio

from tests.gateway.test_tools import OpenScripted, open_scripted

__all__ = ["open_scripted"]

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "clients"
BUILD = ROOT / "build" / "clients"
ENVIRONMENTS = {"langchain": "venv", "instructor": "venv", "pydantic_ai": "venv", "llama_index": "venv-llama-index"}
SUCCEEDS = {"langchain": 4, "instructor": 3, "pydantic_ai": 4, "llama_index": 2}
"""Lines that each prints."""
CITY = json.dumps({"name": "Rome", "inhabitants": 3})


def script(prompt: str) -> str:
    """A call of the first tool that is offered, then words; a city as JSON where there is none."""
    if "thirty" in prompt:
        return "It is 30 degrees."
    offered = re.search(r'"function": \{"name": "(\w+)"', prompt)
    if offered is None:
        return CITY
    return f'<tool_call>\n{{"name": "{offered[1]}", "arguments": {CITY}}}\n</tool_call>'


async def run(open_scripted: OpenScripted, command: list[str | Path]) -> str:
    async with open_scripted(script) as door:
        with trio.fail_after(200):
            done = await trio.run_process(
                [*command, door.url, door.model], capture_stdout=True, stderr=subprocess.STDOUT, check=False, cwd=BUILD
            )
        assert done.returncode == 0, done.stdout.decode()[-4000:]
        return done.stdout.decode()


@pytest.mark.clients
@pytest.mark.parametrize("name", SUCCEEDS)
async def test_python_clients(open_scripted: OpenScripted, name: str) -> None:
    python = BUILD / ENVIRONMENTS[name] / "bin" / "python"
    if not python.exists():
        pytest.skip("scripts/clients installs them")
    said = await run(open_scripted, [python, HERE / f"use_{name}.py"])
    assert len(re.findall("^(?:structured|tools|chat)", said, flags=re.MULTILINE)) == SUCCEEDS[name]


@pytest.mark.clients
@pytest.mark.skipif(not (BUILD / "node_modules" / "ai").exists(), reason="scripts/clients installs it")
async def test_the_ai_sdk(open_scripted: OpenScripted) -> None:
    node = shutil.which("node")
    assert node is not None
    assert "tools" in await run(open_scripted, [node, BUILD / "use_ai_sdk.js"])
