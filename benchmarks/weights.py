"""Weights from a peer: megabytes a second, and what sharing them costs those who decode.

    python benchmarks/weights.py [--blocks 10] [--rounds 5] [--steps 60] [--rates 5 20 100000]

Fetching: blocks of the default model from one server process, into an empty directory, against the bare transport (the
same bytes over one stream between two hosts) and the disk (the same tensors read; the page cache has them). Decoding:
milliseconds of a step through a server of all blocks with one thread, while another process fetches from it again and
again at the rate that the server allows, against the same steps while nobody fetches.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
import trio
from servers import server, table, take_turns

from petals import connect
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.partial import PartialCheckpoint
from petals.peer.base.identity import create_identity
from petals.peer.client.model_client import ModelClient
from petals.peer.net.host import HostConfig, open_host
from petals.peer.node import Peer
from petals.peer.weights.fetch import SwarmWeights
from petals.protocols.stream import ByteStream
from petals.protocols.types import ModelId, PeerId

RAW = "/petals/benchmark/1.0.0"


async def give(total: int) -> None:
    """A host that sends `total` bytes to whoever opens a stream."""
    piece = bytes(1 << 20)

    async def answer(stream: ByteStream) -> None:
        for start in range(0, total, len(piece)):
            await stream.write(memoryview(piece)[: total - start])

    async with open_host(create_identity().key_pair, HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))) as host:
        host.set_handler(RAW, answer)
        print(json.dumps(host.addrs[0]), flush=True)
        await trio.sleep_forever()


async def take(peer: Peer, addr: str, total: int) -> None:
    peer_id = PeerId(addr.rpartition("/")[2])
    stream = await peer.host.open_stream(peer_id, RAW, addrs=[addr])
    while total > 0:
        total -= len(await stream.read(1 << 20))
    await stream.close()


async def fetch(peer: Peer, model: ModelId, blocks: range) -> None:
    """Blocks of `model` into an empty directory, which is thrown away."""
    weights = SwarmWeights(peer.host, peer.directory, model, lambda line: None)
    with tempfile.TemporaryDirectory() as room:
        weights.partial = PartialCheckpoint(model.digest, Path(room))
        await weights.open()
        await weights.fetch_blocks(blocks)


@contextmanager
def child(*words: str) -> Iterator[str]:
    """This file in another process, playing a part; yields what it says first."""
    command = [sys.executable, __file__, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.send_signal(signal.SIGKILL)


def fetch_for_ever(addr: str, blocks: int) -> None:
    """What the other process does while steps are measured."""
    checkpoint = open_checkpoint()
    model = ModelId(checkpoint.name, checkpoint.digest)
    with connect(addr) as swarm:
        swarm.peer.portal.run(fetch, swarm.peer, model, range(1))
        print(json.dumps("fetching"), flush=True)
        while True:
            swarm.peer.portal.run(fetch, swarm.peer, model, range(blocks))


async def step_ms(client: ModelClient, steps: int) -> list[float]:
    """Milliseconds of each decode step of a session of its own."""
    hidden = torch.zeros(1, 1, client.checkpoint.hidden_size)
    session = await client.open_session(client.blocks, 1, steps + 8)
    took = []
    for index in range(steps + 8):
        started = time.perf_counter()
        await session.step(hidden)
        if index >= 8:
            took.append(1e3 * (time.perf_counter() - started))
    await session.close()
    return took


def measure_fetching(blocks: int, rounds: int) -> str:
    checkpoint = open_checkpoint()
    model = ModelId(checkpoint.name, checkpoint.digest)
    names = [name for block in range(blocks) for name, _ in checkpoint.block_tensors(block)]
    total = sum(checkpoint.locate(name)[1].nbytes for name in names)
    with ExitStack() as stack:
        words = ["--serve", "0:1", "--throughput", "100", "--max_share_mb_s", "100000"]
        addr = stack.enter_context(server(*words, threads=1))
        raw = stack.enter_context(child("--give", str(total)))
        peer = stack.enter_context(connect(addr)).peer
        contestants: dict[str, Callable[[], object]] = {
            "raw transport, one stream": partial(peer.portal.run, take, peer, raw, total),
            "fetched, verified, written": partial(peer.portal.run, fetch, peer, model, range(blocks)),
            "read from disk": partial(checkpoint.read, names),
        }
        seconds = take_turns(contestants, rounds)
    return table(f"{total / 1e6:.0f} MB", seconds, total / 1e6, "MB/s")


def measure_decoding(blocks: int, rounds: int, steps: int, rates: list[float]) -> str:
    rows = ["| server shares | ms a step, median (10 % - 90 %) | ratio |", "|---|---|---|"]
    for rate in rates:
        words = ["--serve", "0:30", "--throughput", "100", "--max_share_mb_s", str(rate)]
        quiet: list[float] = []
        busy: list[float] = []
        with server(*words, threads=1) as addr, connect(addr) as swarm:
            run = swarm.peer.portal.run
            client = run(swarm.peer.client)
            run(client.ready)
            for _ in range(rounds):
                quiet += run(step_ms, client, steps)
                with child("--fetch", addr, "--blocks", str(blocks)):
                    busy += run(step_ms, client, steps)
        for name, took in (("nothing", quiet), (f"at most {rate:,.0f} MB/s", busy)):
            tenths = statistics.quantiles(took, n=10)
            ratio = statistics.median(took) / statistics.median(quiet)
            rows.append(
                f"| {name} | {statistics.median(took):.1f} ({tenths[0]:.1f} - {tenths[-1]:.1f}) | {ratio:.2f} |"
            )
    return "\n".join(rows)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="+", default=[5, 20, 100_000], help="of --max_share_mb_s")
    parser.add_argument("--give", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fetch", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.give is not None:
        trio.run(give, options.give)
    elif options.fetch is not None:
        fetch_for_ever(options.fetch, options.blocks)
    else:
        print(measure_fetching(options.blocks, options.rounds), flush=True)
        print("\n" + measure_decoding(options.blocks, options.rounds, options.steps, options.rates))


if __name__ == "__main__":
    main()
