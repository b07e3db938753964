"""Decoding while servers fail: steps per second against the probability of a failure, and what one recovery costs.

    python benchmarks/failover.py [--lengths 128 1024] [--probabilities 0 1e-4 1e-3 1e-2] [--hidden 256]

Four stages of two blocks each, a spare server for every one, all processes of their own. A failure is a connection
that breaks in the middle of a session: at each hop and step with the given probability, seeded. Three ways to go on:
exact replay, fast replay, and starting the whole session again at every failure, as clients without fail-over do. The
last outputs of the exact runs are compared with the undisturbed run bit by bit.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
import trio
from servers import server
from transformers import AutoModelForCausalLM, LlamaConfig

from petals import PeerConfig, Timeouts, open_peer
from petals.peer.client.model_client import ClientOptions, ModelClient
from petals.peer.client.session.session import RemoteSession

STAGES = 4


@dataclass
class Outcome:
    """One run."""

    seconds: float = 0.0
    failures: int = 0
    recovery_s: list[float] = field(default_factory=list)
    last: torch.Tensor | None = None


async def decode(
    client: ModelClient, steps: list[torch.Tensor], probability: float, way: str, seed: int, limit_s: float
) -> Outcome:
    """All steps, or as many as fit into `limit_s`; `seconds` is for all of them, then."""
    dice, outcome = random.Random(seed), Outcome()
    options = ClientOptions(exact_recovery=way != "fast", max_retries=100)

    async def begin() -> RemoteSession:
        return await client.open_session(client.blocks, 1, len(steps), options)

    session, started, position = await begin(), time.perf_counter(), 0
    while position < len(steps):
        broken = [hop for hop in session.hops if dice.random() < probability]
        for hop in broken:
            await hop.messages.reset()
        before = time.perf_counter()
        if broken and way == "restart":
            await session.reset()
            session = await begin()
            for step in steps[:position]:
                await session.step(step)
        outcome.last = await session.step(steps[position])
        outcome.failures += len(broken)
        if broken:
            outcome.recovery_s.append(time.perf_counter() - before)
        position += 1
        if time.perf_counter() - started > limit_s:
            break
    outcome.seconds = (time.perf_counter() - started) / position * len(steps)
    if position < len(steps):
        outcome.last = None
    await session.close()
    return outcome


async def recover(client: ModelClient, steps: list[torch.Tensor], way: str) -> float:
    """Milliseconds of the step in which one hop of four has failed after `steps`, less an ordinary step."""
    session = await client.open_session(client.blocks, 1, len(steps) + 8, ClientOptions(exact_recovery=way != "fast"))
    for step in steps:
        await session.step(step)
    ordinary, broken = [], []
    for index in range(3):
        if index == 2:
            await session.hops[1].messages.reset()
        started = time.perf_counter()
        await session.step(steps[0])
        (broken if index == 2 else ordinary).append(time.perf_counter() - started)
    await session.close()
    return 1e3 * (broken[0] - statistics.mean(ordinary))


async def measure(address: str, model: Path, options: argparse.Namespace) -> None:
    """Run and print."""
    config = PeerConfig(initial_peers=(address,), model=str(model), timeouts=Timeouts(route_s=60.0))
    async with open_peer(config, progress=lambda _: None) as peer:
        client = await peer.client()
        await client.ready()
        generator = torch.Generator().manual_seed(0)
        longest = max([*options.lengths, *options.histories])
        steps = list(torch.randn(longest, 1, 1, options.hidden, generator=generator))
        print(f"{STAGES} stages x 2 blocks, hidden {options.hidden}, a spare each; torch {torch.__version__}\n")
        print("| length | failures per hop and step | exact replay, steps/s (ratio) | fast replay | restart ", end="")
        print("| failures, bit-equal |")
        print("|---|---|---|---|---|---|")
        for length in options.lengths:
            base, truth = 0.0, None
            for probability in options.probabilities:
                cells, said = [], ""
                for way in ("exact", "fast", "restart"):
                    outcome = await decode(client, steps[:length], probability, way, options.seed, options.limit)
                    speed = length / outcome.seconds
                    if way == "exact" and probability == 0:
                        base, truth = speed, outcome.last
                    if way == "exact":
                        equal = outcome.last is not None and truth is not None and torch.equal(outcome.last, truth)
                        said = (
                            f"{outcome.failures}, {'yes' if equal else 'no' if outcome.last is not None else 'cut off'}"
                        )
                    cells.append(f"{speed:.1f} ({speed / base:.2f})")
                print(f"| {length} | {probability:g} | {' | '.join(cells)} | {said} |", flush=True)
        print("\n| history, steps | one recovery, exact, ms | fast, ms |\n|---|---|---|")
        for history in options.histories:
            costs = {
                way: [await recover(client, steps[:history], way) for _ in range(options.rounds)]
                for way in ("exact", "fast")
            }
            cells = [f"{statistics.median(c):.0f} ({min(c):.0f} - {max(c):.0f})" for c in costs.values()]
            print(f"| {history} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Make the model, start eight servers, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--probabilities", type=float, nargs="+", default=[0.0, 1e-4, 1e-3, 1e-2])
    parser.add_argument("--histories", type=int, nargs="+", default=[16, 128, 1024])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one cell; slower ones are extrapolated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        torch.manual_seed(0)
        shape = LlamaConfig(
            hidden_size=options.hidden, intermediate_size=3 * options.hidden, num_hidden_layers=2 * STAGES,
            num_attention_heads=8, num_key_value_heads=4, vocab_size=256, max_position_embeddings=2048,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(shape).save_pretrained(directory)
        joining: tuple[str, ...] = ()
        for stage in range(STAGES):
            for _ in range(2):
                blocks = f"{2 * stage}:{2 * stage + 2}"
                address = stack.enter_context(
                    server(directory, "--serve", blocks, "--cache_mb", "256", *joining, threads=1)
                )
                joining = joining or ("--initial_peers", address)
        trio.run(measure, joining[1], Path(directory), options)


if __name__ == "__main__":
    main()
