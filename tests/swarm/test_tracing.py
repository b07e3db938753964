"""`--trace`: the file that Perfetto opens says where the time of every step went, and its parts make up the whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.client.model_client import ClientOptions
from petals.peer.client.session.session import StepTrace
from petals.peer.client.tracing import PARTS, TraceFile
from petals.protocols.errors import UserError
from tests.swarm.conftest import Swarm

MakeSwarm = Callable[..., Swarm]


@pytest.mark.parametrize("push", [True, False])
async def test_the_parts_of_every_step_make_up_the_whole(make_swarm: MakeSwarm, tmp_path: Path, push: bool) -> None:
    swarm = make_swarm()
    await swarm.add(range(15))
    await swarm.add(range(15, 30))
    client = await swarm.add()
    said: list[str] = []
    steps: list[StepTrace] = []
    path = tmp_path / "trace.json"
    with TraceFile(path, said.append) as trace:

        def note(step: StepTrace) -> None:
            steps.append(step)
            trace.note(step)

        options = ClientOptions(on_step=note, use_server_to_server=push)
        asked = GenerationOptions(max_new_tokens=5)
        stream = await client.generate("A cat sat on", options=asked, client=options)
        tokens = [token async for token in stream]
    assert len(steps) == len(tokens) == 5
    assert [step.tokens for step in steps] == [len(stream.prompt_ids), 1, 1, 1, 1]
    for step in steps:
        assert [hop.blocks for hop in step.hops] == [range(15), range(15, 30)]
        for hop in step.hops:
            parts = hop.parts()
            assert set(parts) == set(PARTS)
            assert all(parts[name] > 0 for name in ("serialise", "encrypt", "compute"))
            if parts["network"]:
                assert sum(parts.values()) == pytest.approx(hop.round_trip_s)
    events = json.loads(path.read_text())
    assert len(events) == 5 * 2 * 7
    wholes = [event for event in events if event["args"]]
    assert [event["args"]["position"] for event in wholes[::2]] == [step.position for step in steps]
    assert "median ms: serialise" in said[0]
    assert str(path) in said[1]


def test_a_trace_without_a_step_is_a_trace(tmp_path: Path) -> None:
    with TraceFile(tmp_path / "empty.json", lambda line: None):
        pass
    assert json.loads((tmp_path / "empty.json").read_text()) == []


def test_a_file_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        TraceFile(tmp_path / "nowhere" / "trace.json", print)


@pytest.mark.swarm
async def test_the_command_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    words = ["peer", "--serve", "0:30", "--generate", "A cat sat on", "--max_new_tokens", "3", "--trace", str(path)]
    done = await trio.run_process(
        [sys.executable, "-m", "petals.cli.main", *words], capture_stdout=True, capture_stderr=True
    )
    assert b"ui.perfetto.dev" in done.stderr
    assert len(json.loads(path.read_text())) == 3 * 7
