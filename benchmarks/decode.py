"""Tokens per second: a swarm of two processes, the same blocks in one process, plain transformers; in one run.

    python benchmarks/decode.py [--tokens 64] [--rounds 5] [--prompt "..."]

Prints a Markdown table of medians with spread, as ratios to plain transformers in the same run, and what a hop costs
beyond its compute. The three take turns, round by round, so that a machine that drifts drifts for all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from servers import two_servers
from transformers import AutoModelForCausalLM

from petals import AutoDistributedModelForCausalLM, connect
from petals.models.causal_lm import load_causal_lm
from petals.models.checkpoint import open_checkpoint
from petals.models.loading import load_span
from petals.models.local import LocalChain
from petals.peer.client.chain import RemoteChainSession


def timed(generate: Callable[[int], Any], tokens: int) -> float:
    """Tokens per second of decoding: a run of `tokens` less a run of one, so that the prompt does not count."""
    started = time.perf_counter()
    generate(1)
    first = time.perf_counter() - started
    started = time.perf_counter()
    generate(tokens)
    return (tokens - 1) / (time.perf_counter() - started - first)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", default="A cat sat on")
    options = parser.parse_args()

    checkpoint = open_checkpoint()
    blocks = range(checkpoint.num_blocks)
    ids = checkpoint.tokenizer()(options.prompt, return_tensors="pt")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(str(checkpoint.directory), dtype=torch.float32).eval()
    local = load_causal_lm(checkpoint, LocalChain(load_span(checkpoint, blocks, dtype=torch.float32)))
    speeds: dict[str, list[float]] = {"plain transformers": [], "LocalChain, one process": [], "swarm, two servers": []}
    overheads: list[float] = []
    computes: list[float] = []

    with two_servers(len(blocks)) as address, connect(address) as peer:
        remote = AutoDistributedModelForCausalLM.from_pretrained(peer=peer)

        def generate(model: Any) -> Callable[[int], Any]:
            return lambda n: model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)

        expected = generate(plain)(options.tokens)
        assert torch.equal(generate(remote)(options.tokens), expected), "the swarm says something else"
        assert torch.equal(generate(local)(options.tokens), expected), "LocalChain says something else"
        for _ in range(options.rounds):
            for name, model in zip(speeds, (plain, local, remote), strict=True):
                speeds[name].append(timed(generate(model), options.tokens))
        with remote.inference_session(max_length=256) as session, torch.no_grad():
            hidden = torch.randn(1, 1, checkpoint.hidden_size)
            for step in range(200):
                session.step(hidden)
                chain_session = session.cache.session
                assert isinstance(chain_session, RemoteChainSession)
                if step >= 10:
                    overheads += [1e3 * (hop.round_trip_s - hop.compute_s) for hop in chain_session.trace]
                    computes += [1e3 * hop.compute_s for hop in chain_session.trace]

    base = statistics.median(speeds["plain transformers"])
    print(f"{checkpoint.name}, float32, {torch.get_num_threads()} threads, {options.tokens} tokens, "
          f"{options.rounds} rounds, torch {torch.__version__}\n")  # fmt: skip
    print("| decode | tokens/s, median (min - max) | ratio |\n|---|---|---|")
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.1f} ({min(values):.1f} - {max(values):.1f}) | {median / base:.2f} |")
    quantiles = statistics.quantiles(overheads, n=100)
    print(f"\nPer hop and step: compute {statistics.median(computes):.2f} ms; round trip minus compute "
          f"{quantiles[49]:.2f} ms median, {quantiles[98]:.2f} ms p99 ({len(overheads)} samples)")  # fmt: skip


if __name__ == "__main__":
    main()
