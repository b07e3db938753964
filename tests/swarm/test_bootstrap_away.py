"""A bootstrap that dies, and comes back knowing nobody: servers find it again, and clients find them through it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from subprocess import PIPE

import pytest
import trio

from petals.peer.base.config import PeerConfig, ServeConfig
from petals.peer.base.identity import create_identity
from petals.peer.client.generation.generation import GenerationOptions
from petals.peer.node import open_peer
from tests.swarm.conftest import Swarm

ROOT = Path(__file__).parents[2]
BOOTSTRAP = [sys.executable, "-m", "petals.cli.main", "peer", "--bootstrap", "--json", "--no_mdns", "--listen"]


async def start(nursery: trio.Nursery, listen: str, *words: str | Path) -> tuple[trio.Process, str]:
    """A bootstrap process, and its address once it listens."""
    command = [*BOOTSTRAP, listen, *map(str, words)]
    process: trio.Process = await nursery.start(partial(trio.run_process, command, stdout=PIPE, cwd=ROOT, check=False))
    line = b""
    assert process.stdout is not None
    while not line.endswith(b"\n"):
        piece = await process.stdout.receive_some()
        assert piece, "the bootstrap did not start"
        line += piece
    return process, json.loads(line)["addrs"][0]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "bootstrap.key"
    create_identity(path)
    return path


async def ask(initial: Sequence[str]) -> list[int]:
    """Ten tokens, for a client that knows nobody else."""
    config = PeerConfig(initial_peers=tuple(initial))
    async with open_peer(config) as client:
        stream = await client.generate([5, 7, 9], options=GenerationOptions(max_new_tokens=10))
        return [token.id async for token in stream]


@pytest.mark.swarm
async def test_a_bootstrap_that_is_killed_and_comes_back_has_its_swarm_again(
    make_swarm: Callable[..., Swarm], key: Path, nursery: trio.Nursery
) -> None:
    swarm = make_swarm()
    process, addr = await start(nursery, "/ip4/127.0.0.1/tcp/0", "--identity", key)
    server = await swarm.add(range(30), also={"initial_peers": (addr,)})
    before = await ask([addr])
    process.send_signal(signal.SIGKILL)
    await process.wait()
    with trio.fail_after(20):
        while server.host.connected_peers():  # noqa: ASYNC110  # a poll of the state waited for
            await trio.sleep(0.01)
    process, again = await start(nursery, addr.partition("/p2p/")[0], "--identity", key)
    assert again == addr
    assert await ask([addr]) == before  # within route_s: the server has dialled and announced again
    process.kill()
    nursery.cancel_scope.cancel()


@pytest.mark.swarm
async def test_a_server_that_starts_before_its_bootstrap_says_so_and_waits(key: Path, nursery: trio.Nursery) -> None:
    process, addr = await start(nursery, "/ip4/127.0.0.1/tcp/0", "--identity", key)
    process.kill()
    await process.wait()
    said: list[str] = []
    config = PeerConfig(
        serve=ServeConfig(num_blocks=30, throughput=100.0, cache_bytes=64 << 20),
        initial_peers=(addr,),
        wait_for_initial_peers=True,
    )

    async def serve() -> None:
        async with open_peer(config, progress=said.append):
            await trio.sleep_forever()

    nursery.start_soon(serve)
    assert "no initial peer answers" in (first := await until_said(said, "waiting"))
    assert "refused" in first
    process, _ = await start(nursery, addr.partition("/p2p/")[0], "--identity", key)
    await until_said(said, "joined the swarm")
    await until_said(said, "serving blocks 0:30")
    assert len(await ask([addr])) == 10
    process.kill()
    nursery.cancel_scope.cancel()


async def until_said(said: list[str], words: str) -> str:
    """A poll: some of it is said in threads."""
    with trio.fail_after(60):
        while not (found := [line for line in said if words in line]):  # noqa: ASYNC110
            await trio.sleep(0.01)
    return found[0]


@pytest.mark.swarm
async def test_two_bootstraps_that_name_each_other_may_start_in_any_order(key: Path, nursery: trio.Nursery) -> None:
    first, addr = await start(nursery, "/ip4/127.0.0.1/tcp/0", "--identity", key)
    first.kill()
    await first.wait()
    command = [*BOOTSTRAP, "/ip4/127.0.0.1/tcp/0", "--initial_peers", addr]
    second: trio.Process = await nursery.start(
        partial(trio.run_process, command, stdout=PIPE, stderr=PIPE, cwd=ROOT, check=False)
    )
    assert second.stdout is not None
    assert second.stderr is not None
    said = b""
    while b"waiting until one does" not in said:
        said += await second.stderr.receive_some()
    first, _ = await start(nursery, addr.partition("/p2p/")[0], "--identity", key)
    assert json.loads(await second.stdout.receive_some())["peer_id"]
    for each in (first, second):
        each.kill()
    nursery.cancel_scope.cancel()
