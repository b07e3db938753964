"""Real processes, real signals: a server killed, and one frozen, in the middle of a generation."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import PIPE

import pytest
import trio

from petals.peer.client.generation.generation_options import GenerationOptions
from tests.swarm.conftest import Swarm, Truth, all_leases_returned

ROOT = Path(__file__).parents[2]
SERVER = [sys.executable, "-m", "petals.cli.main", "peer", "--throughput", "100", "--json"]


async def start(nursery: trio.Nursery, *words: str) -> tuple[trio.Process, str]:
    """A serving process and its peer ID, once it serves; killed with the nursery."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = partial(trio.run_process, [*SERVER, *words], stdout=PIPE, cwd=ROOT, check=False, env=environment)
    process: trio.Process = await nursery.start(run)
    line = b""
    assert process.stdout is not None
    while not line.endswith(b"\n"):
        piece = await process.stdout.receive_some()
        assert piece, "the server did not start"
        line += piece
    return process, json.loads(line)["peer_id"]


@pytest.mark.swarm
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_dead_process_costs_no_token(
    make_swarm: Callable[..., Swarm], smollm: Truth, sign: signal.Signals, nursery: trio.Nursery
) -> None:
    client = await make_swarm().add()
    servers: dict[str, trio.Process] = {}

    async def serve(blocks: str) -> None:
        process, peer_id = await start(nursery, "--serve", blocks, "--initial_peers", *client.addrs)
        servers[peer_id] = process

    async with trio.open_nursery() as starting:
        for blocks in ("0:15", "15:30", "0:15", "15:30"):
            starting.start_soon(serve, blocks)
    stream = await client.generate("A cat sat on", options=GenerationOptions(max_new_tokens=24))
    got: list[int] = []
    victims = []
    async for token in stream:
        got.append(token.id)
        if len(got) in (5, 14):
            victim = stream.route[0 if len(got) == 5 else -1].peer_id
            victims.append(victim)
            servers[victim].send_signal(sign)
    inputs = smollm.tokenizer("A cat sat on", return_tensors="pt")
    expected = smollm.model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert got == expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert {hop.peer_id for hop in stream.route}.isdisjoint(victims)
    if sign == signal.SIGSTOP:  # thawed, they are as good as new: nobody else is left
        for peer_id, process in servers.items():
            process.send_signal(signal.SIGCONT if peer_id in victims else signal.SIGKILL)
        again = await client.generate("A cat sat on", options=GenerationOptions(max_new_tokens=12))
        assert [token.id async for token in again] == got[:12]
        assert {hop.peer_id for hop in again.route} == set(victims)
    for process in servers.values():
        process.kill()


@pytest.mark.swarm
async def test_a_client_that_is_killed_leaves_no_lease_behind(
    make_swarm: Callable[..., Swarm], nursery: trio.Nursery
) -> None:
    server = await make_swarm().add(range(30))
    assert server.server is not None
    words = [*SERVER[:4], "--generate", "A cat sat on", "--max_new_tokens", "2000", "--initial_peers", *server.addrs]
    run = partial(trio.run_process, words, cwd=ROOT, check=False, capture_stdout=True, capture_stderr=True)
    process: trio.Process = await nursery.start(run)
    with trio.fail_after(60):
        while not server.server.inbound.sessions:  # noqa: ASYNC110  # a poll of the state waited for
            await trio.sleep(0.001)
    process.kill()
    await all_leases_returned(server)
