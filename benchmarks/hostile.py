"""What strangers can do to the people who are served: step latency under attack, against a quiet reference.

    python benchmarks/hostile.py [--seconds 10] [--rounds 3] [--connections 1000] [--attack NAME ...]

One server, one client that decodes, and the attackers, each a process of its own; the attackers with the lowest
priority, since on a machine of their own they would not take the server's processor. For every attack, quiet and
attacked seconds alternate. Every step of the client is compared, bit by bit, with the same step before any attack. Told
are the 50th and 95th percentile of a step, the ratio of the latter to the quiet one, the server's memory after it,
whether all of its cache could be leased again afterwards, and what the attackers got done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import psutil
import torch
import trio
from servers import server
from transformers import AutoModelForCausalLM, LlamaConfig

from petals import PeerConfig, open_peer
from petals.peer.client.model_client import ModelClient
from petals.peer.net.host import HostConfig
from petals.protocols.errors import SwarmError
from petals.protocols.types import ModelId, PeerId

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from tests.fakes.attackers import PROTOCOLS, Attacker, Target, idle_connection, run_attacker  # noqa: E402

BLOCKS, LENGTH, CACHE_MB = 8, 256, 64
FOREVER = 1 << 40


async def again(attack: Callable[..., Awaitable[None]], attacker: Attacker) -> None:
    """Repeat it."""
    while True:
        await attack(attacker)


ATTACKS: dict[str, list[Callable[[Attacker], Awaitable[None]]]] = {
    "slow-loris streams, 200 of them": [
        *[Attacker.slow_loris] * 40, *[partial(Attacker.silence, protocol=each) for each in PROTOCOLS] * 32
    ],
    "half handshakes, 200": [Attacker.half_a_handshake] * 200,
    "huge sizes, 4 peers": [partial(again, Attacker.huge_sizes)] * 4,
    "steps out of order, 4 peers": [partial(again, Attacker.out_of_order)] * 4,
    "guessed sessions, 4 peers": [partial(Attacker.guess_sessions, count=FOREVER)] * 4,
    "the whole cache, 1 peer": [partial(Attacker.exhaust_cache, max_length=LENGTH, count=500)],
    "the whole cache, 40 peers": [partial(Attacker.exhaust_cache, max_length=LENGTH, count=16)] * 40,
    "record floods, 4 peers": [partial(Attacker.flood_records, count=FOREVER)] * 4,
    "forward of 16,384 tokens, mask, prompts, factors, 1 peer": [
        partial(again, partial(Attacker.train, tokens=16384, backward=False, extras=True))
    ],
    "backward of 16,384 tokens, mask, prompts, factors, 1 peer": [
        partial(again, partial(Attacker.train, tokens=16384, backward=True, extras=True))
    ],
    "forward and backward of 2,048 tokens, 4 peers": [
        partial(again, partial(Attacker.train, tokens=2048, backward=backward)) for backward in (False, True) * 2
    ],
    "half-sent requests, 4 peers": [partial(Attacker.half_sent, tokens=16000, count=64)] * 4,
    "pushes that wait, 4 peers": [partial(Attacker.fill_mailbox, tokens=1024, count=64)] * 4,
    "reset storm, 1 peer": [partial(Attacker.reset_storm, count=FOREVER)],
    "reset storm, 8 peers": [partial(Attacker.reset_storm, count=FOREVER)] * 8,
}  # fmt: skip
IDLE = "idle connections"
HEAD_START_S = 4.0
"""Imports, and the first blow."""
CONNECTS_PER_S = HostConfig().connects_per_s
"""What a host takes from one IP address: so long the idle need until all are there."""


def head_start_s(name: str, connections: int) -> float:
    """How long an attack runs before the honest steps are timed: attacks are about what goes on, not how it begins."""
    return HEAD_START_S + (connections / CONNECTS_PER_S if name == IDLE else 0.0)


async def attack(name: str, target: Target, seconds: float, connections: int) -> None:
    """In a process of its own: attack, then tell what was done."""
    attackers: list[Attacker] = []
    idle: Counter[bool] = Counter()
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for one in ATTACKS.get(name, ()):
                nursery.start_soon(run_attacker, target, one, attackers)
            if name == IDLE:
                for _ in range(connections):
                    nursery.start_soon(idle_connection, target, lambda let_in: idle.update([let_in]))
                    await trio.sleep(1 / CONNECTS_PER_S)
    done: Counter[str] = Counter()
    for attacker in attackers:
        done.update(attacker.done)
    if name == IDLE:
        done.update({"let in": idle[True], "sent away": idle[False]})
    print(json.dumps(done))


async def decode(
    client: ModelClient, seconds: float, truth: list[torch.Tensor], steps: list[torch.Tensor]
) -> list[float]:
    """Milliseconds of each step; what differs from `truth` ends the run. An empty truth is filled."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        session = await client.open_session(client.blocks, 1, LENGTH)
        for index, step in enumerate(steps):
            began = time.perf_counter()
            output = await session.step(step)
            times.append(1e3 * (time.perf_counter() - began))
            if len(truth) < len(steps):
                truth.append(output)
            assert torch.equal(output, truth[index]), f"step {index} is wrong"
            if time.perf_counter() > until and len(truth) == len(steps):
                break
        assert not session.failures, "the honest session had to be rebuilt"
        await session.close()
    return times


def p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20)[-1]


async def all_can_be_leased(client: ModelClient, tokens: int) -> bool:
    """Whether what the attackers held is free again."""
    try:
        with trio.fail_after(10):
            session = await client.open_session(client.blocks, 1, tokens)
        await session.close()
    except (SwarmError, trio.TooSlowError):
        return False
    return True


async def measure(address: str, model: Path, process: psutil.Process, options: argparse.Namespace) -> None:
    """Run and print."""
    async with open_peer(PeerConfig(initial_peers=(address,), model=str(model)), progress=lambda _: None) as peer:
        client = await peer.client()
        await client.ready()
        digest = client.model.digest
        told = {
            "peer_id": address.rpartition("/")[2],
            "addr": address,
            "digest": digest,
            "hidden": client.checkpoint.hidden_size,
        }
        steps = list(torch.randn(LENGTH - 8, 1, 1, options.hidden, generator=torch.Generator().manual_seed(0)))
        truth: list[torch.Tensor] = []
        await decode(client, 2, truth, steps)
        columns = ("attack", "p50 quiet, ms", "attacked", "p95 quiet, ms", "attacked", "p95 ratio", "server, MiB")
        print("| " + " | ".join((*columns, "all cache free after", "done")) + " |\n" + "|---" * 9 + "|")
        for name in options.attack:
            quiet: list[float] = []
            attacked: list[float] = []
            done: Counter[str] = Counter()
            for _ in range(options.rounds):
                quiet += await decode(client, options.seconds, truth, steps)
                words = ["nice", "-n", "19", sys.executable, __file__, "--strike", name, "--target", json.dumps(told)]
                head_s = head_start_s(name, options.connections)
                words += ["--seconds", str(options.seconds + head_s), "--connections", str(options.connections)]
                striking = await trio.lowlevel.open_process(words, stdout=subprocess.PIPE)
                await trio.sleep(head_s)
                attacked += await decode(client, options.seconds, truth, steps)
                assert striking.stdout is not None
                said_so = b"".join([piece async for piece in striking.stdout])
                await striking.wait()
                done.update(json.loads(said_so or b"{}"))
                await trio.sleep(1)
            free = await all_can_be_leased(client, options.lease_tokens)
            resident = process.memory_info().rss >> 20
            said = ", ".join(f"{count:,} {what}" for what, count in sorted(done.items()))
            ratio = p95(attacked) / p95(quiet)
            print(
                f"| {name} | {statistics.median(quiet):.1f} | {statistics.median(attacked):.1f} | {p95(quiet):.1f} "
                f"| {p95(attacked):.1f} | {ratio:.2f} | {resident} | {'yes' if free else 'no'} | {said} |",
                flush=True,
            )


def main() -> None:
    """Make the model, start the server, measure; or attack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--attack", nargs="+", default=[*ATTACKS, IDLE], choices=[*ATTACKS, IDLE])
    parser.add_argument("--strike", help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.strike:
        told = json.loads(options.target)
        target = Target(PeerId(told["peer_id"]), told["addr"], ModelId("m", told["digest"]), told["hidden"], BLOCKS)
        trio.run(attack, options.strike, target, options.seconds, options.connections)
        return
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        shape = LlamaConfig(
            hidden_size=options.hidden, intermediate_size=3 * options.hidden, num_hidden_layers=BLOCKS,
            num_attention_heads=8, num_key_value_heads=8, vocab_size=256, max_position_embeddings=1 << 20,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(shape).save_pretrained(directory)
        options.lease_tokens = int(0.9 * (CACHE_MB << 20) / (BLOCKS * 2 * options.hidden * 4))
        words = ("--serve", f"0:{BLOCKS}", "--cache_mb", str(CACHE_MB))
        with server(directory, *words, threads=1) as address:
            process = psutil.Process().children()[-1]
            trio.run(measure, address, Path(directory), process, options)


if __name__ == "__main__":
    main()
