"""Many users of one server: session steps per second together, and one user's latency while another brings a prompt.

    python benchmarks/concurrency.py [--shape smollm2] [--sessions 1 4 16 64] [--steps 30]

One server process with all blocks, one client process; hidden states in and out, as heads are the clients' own cost.
Ratios are to one session in the same run. The last lines compare the largest figure with what this machine's matrix
products allow, and the latency of one user's steps with and without a prompt of 1,024 tokens beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import trio
from servers import server
from shapes import SHAPES, model_of

from petals import PeerConfig, open_peer
from petals.models.kernels.machine import gigabytes, gigaflops
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import block_numel
from petals.peer.client.model_client import ModelClient

PROMPT = 1024


async def steps(client: ModelClient, count: int, hidden: torch.Tensor, times: list[float]) -> None:
    """One session of `count` steps; appends the seconds of each, but for the first three."""
    session = await client.open_session(client.blocks, 1, count)
    for index in range(count):
        started = time.perf_counter()
        await session.step(hidden)
        if index >= 3:
            times.append(time.perf_counter() - started)
    await session.close()


async def prefill(client: ModelClient, hidden: torch.Tensor) -> float:
    """Seconds of one prompt in a session of its own."""
    session = await client.open_session(client.blocks, 1, hidden.shape[1])
    started = time.perf_counter()
    await session.step(hidden)
    took = time.perf_counter() - started
    await session.close()
    return took


async def together(client: ModelClient, sessions: int, count: int, hidden: torch.Tensor) -> tuple[float, list[float]]:
    """Steps per second of all sessions, and the seconds of each step."""
    times: list[float] = []
    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(sessions):
            nursery.start_soon(steps, client, count, hidden, times)
    return sessions * count / (time.perf_counter() - started), times


async def beside_a_prompt(client: ModelClient, hidden: torch.Tensor) -> tuple[list[float], float]:
    """Seconds of one session's steps while another's prompt is computed, and of that prompt."""
    prompt = torch.randn(1, PROMPT, hidden.shape[2])
    times: list[float] = []
    session = await client.open_session(client.blocks, 1, 1000)
    for _ in range(5):
        await session.step(hidden)
    took = 0.0

    async def bring() -> None:
        nonlocal took
        took = await prefill(client, prompt)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bring)
        while not took:
            started = time.perf_counter()
            await session.step(hidden)
            times.append(time.perf_counter() - started)
    await session.close()
    return times, took


def p95(times: list[float]) -> float:
    """In milliseconds."""
    return 1e3 * statistics.quantiles(times, n=20)[-1]


async def measure(address: str, model: str | None, options: argparse.Namespace) -> None:
    """Run and print."""
    checkpoint = open_checkpoint(model)
    weights = checkpoint.num_blocks * block_numel(checkpoint.config)
    config = PeerConfig(initial_peers=(address,), model=model)
    async with open_peer(config, progress=lambda _: None) as peer:
        client = await peer.client()
        await client.ready()
        hidden = torch.randn(1, 1, checkpoint.hidden_size)
        await together(client, 4, 8, hidden)  # so that nothing is measured for the first time
        print(f"{options.shape}, {checkpoint.num_blocks} blocks, {4 * weights / 1e6:,.0f} MB in float32, "
              f"{options.steps} steps, torch {torch.__version__}\n")  # fmt: skip
        print("| sessions | steps/s together | ratio | step, median ms | step, p95 ms |\n|---|---|---|---|---|")
        base = 0.0
        for sessions in options.sessions:
            rates, times = [], []
            for _ in range(options.rounds):
                rate, took = await together(client, sessions, options.steps, hidden)
                rates.append(rate)
                times += took
            rate = statistics.median(rates)
            base = base or rate
            print(f"| {sessions} | {rate:.1f} ({min(rates):.1f} - {max(rates):.1f}) | {rate / base:.2f} | "
                  f"{1e3 * statistics.median(times):.1f} | {p95(times):.1f} |", flush=True)  # fmt: skip
        flops, bandwidth = gigaflops(checkpoint.hidden_size), gigabytes(checkpoint.hidden_size)
        print(f"\nThis machine: {flops:.0f} GFLOP/s, which allows {flops * 1e9 / 2 / weights:.0f} steps/s of many "
              f"sessions; {bandwidth:.1f} GB/s, {bandwidth * 1e9 / 4 / weights:.1f} steps/s of one.")  # fmt: skip
        alone: list[float] = []
        await steps(client, 60, hidden, alone)
        quick = await prefill(client, torch.randn(1, PROMPT, checkpoint.hidden_size))
        beside, prompts = list[float](), list[float]()
        for _ in range(3):
            times, took_s = await beside_a_prompt(client, hidden)
            beside += times
            prompts.append(took_s)
        slow = statistics.median(prompts)
        factor = p95(beside) / p95(alone)
        print(f"\n{PROMPT} tokens of prompt: {quick:.2f} s alone, {slow:.2f} s beside one that decodes; its steps "
              f"then take {p95(beside):.1f} ms (p95 of {len(beside)}) instead of {p95(alone):.1f}: {factor:.2f} times; "
              f"median {statistics.median(beside) / statistics.median(alone):.2f} times.")  # fmt: skip


def main() -> None:
    """Start the server and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quant_type", default="none")
    options = parser.parse_args()
    with model_of(options.shape) as model:
        count = open_checkpoint(model).num_blocks
        words = (*([model] if model else []), "--serve", f"0:{count}", "--quant_type", options.quant_type)
        with server(*words) as address:
            trio.run(measure, address, model, options)


if __name__ == "__main__":
    main()
