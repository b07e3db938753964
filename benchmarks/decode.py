"""Tokens per second: a swarm of two processes, the same blocks in one process, plain transformers; in one run.

    python benchmarks/decode.py [--shape smollm2|bloom-560m|llama-24x1024] [--tokens 64] [--rounds 5] [--threads N]
                                [--stored float32]

Then the same with int8 blocks, and with an int8 head too. `--threads`: of each server's torch (default: torch's own
choice). `--stored`: the random weights are in this dtype, not in the one that such models are published in; what
computes is float32 in any case.

Prints a Markdown table of medians with spread, as ratios to plain transformers in the same run, and what a hop costs
beyond its compute. They take turns, round by round, so that a machine that drifts drifts for all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

# Before torch, so that its threads do not keep cores from the servers (docs/deploy.md).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# isort: split
import torch
from servers import two_servers
from shapes import SHAPES, model_of
from transformers import AutoModelForCausalLM

from petals import AutoDistributedModelForCausalLM, connect
from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.local import LocalChain
from petals.models.kernels.machine import gigabytes
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from petals.peer.client.remote_chain import RemoteChainSession


def timed(generate: Callable[[int], Any], tokens: int) -> float:
    """Tokens per second of decoding: a run of `tokens` less a run of one, so that the prompt does not count."""
    started = time.perf_counter()
    generate(1)
    first = time.perf_counter() - started
    started = time.perf_counter()
    generate(tokens)
    return (tokens - 1) / (time.perf_counter() - started - first)


def hops_of(model: Any, hidden_size: int) -> tuple[list[float], list[float]]:
    """Milliseconds of 190 steps at each hop: round trip less compute, and compute."""
    overheads: list[float] = []
    computes: list[float] = []
    with model.inference_session(max_length=256) as session, torch.no_grad():
        hidden = torch.randn(1, 1, hidden_size)
        for step in range(200):
            session.step(hidden)
            chain_session = session.cache.session
            assert isinstance(chain_session, RemoteChainSession)
            if step >= 10:
                overheads += [1e3 * (hop.round_trip_s - hop.compute_s) for hop in chain_session.trace]
                computes += [1e3 * hop.compute_s for hop in chain_session.trace]
    return overheads, computes


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--stored", choices=("float32", "float16", "bfloat16"), default=None)
    options = parser.parse_args()
    with model_of(options.shape, getattr(torch, options.stored or "", None)) as directory:
        compare(directory, options)


def compare(directory: str | None, options: argparse.Namespace) -> None:
    """Run one model and print."""
    checkpoint = open_checkpoint(directory)
    blocks = range(checkpoint.num_blocks)
    ids = torch.arange(1000, 1008)[None] % checkpoint.config.vocab_size
    plain = AutoModelForCausalLM.from_pretrained(str(checkpoint.directory), dtype=torch.float32).eval()
    spans = {quant: load_span(checkpoint, blocks, dtype=torch.float32, quant_type=quant) for quant in ("none", "int8")}
    words = [directory] if directory is not None else []
    with ExitStack() as stack:
        models = {"plain transformers": plain}
        for quant, span in spans.items():
            title = "" if quant == "none" else ", int8"
            models[f"LocalChain, one process{title}"] = load_causal_lm(
                checkpoint, LocalChain(span), dtype=torch.float32
            )
            address = stack.enter_context(
                two_servers(len(blocks), *words, "--quant_type", quant, threads=options.threads)
            )
            peer = stack.enter_context(connect(address, model=directory))
            models[f"swarm, two servers{title}"] = AutoDistributedModelForCausalLM.from_pretrained(peer=peer)
        models["LocalChain, one process, int8, head too"] = load_causal_lm(
            checkpoint, LocalChain(spans["int8"]), dtype=torch.float32, head_quant="int8"
        )
        models["swarm, two servers, int8, head too"] = AutoDistributedModelForCausalLM.from_pretrained(
            peer=peer, head_quant="int8"
        )

        def generate(model: Any) -> Callable[[int], Any]:
            return lambda n: model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)

        truth = generate(plain)(options.tokens)
        for name, model in models.items():
            tokens = generate(model)(options.tokens)
            if directory is None and "int8" not in name:  # random weights have near ties that rounding decides
                assert torch.equal(tokens, truth), name
        speeds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(options.rounds):
            for name, model in models.items():
                speeds[name].append(timed(generate(model), options.tokens))
        overheads, computes = hops_of(models["swarm, two servers"], checkpoint.hidden_size)

    weights = sum(parameter.nbytes for parameter in plain.parameters())
    embeddings = plain.get_input_embeddings().weight
    if plain.get_output_embeddings().weight is not embeddings:
        weights -= embeddings.nbytes  # looked up, not read
    floor = 1e9 * gigabytes(checkpoint.hidden_size) / weights
    base = statistics.median(speeds["plain transformers"])
    stored = str(checkpoint.dtype).removeprefix("torch.")
    threads = f"{torch.get_num_threads()} threads, servers {options.threads or 'the same'}"
    print(f"{options.shape}, stored in {stored}, computed in float32, {threads}, {options.tokens} tokens, "
          f"{options.rounds} rounds, torch {torch.__version__}\n")  # fmt: skip
    print("| decode | tokens/s, median (min - max) | ratio | of the float32 floor |\n|---|---|---|---|")
    for name, values in speeds.items():
        median = statistics.median(values)
        share = "" if "int8" in name else f"{median / floor:.0%}"
        print(f"| {name} | {median:.1f} ({min(values):.1f} - {max(values):.1f}) | {median / base:.2f} | {share} |")
    quantiles = statistics.quantiles(overheads, n=100)
    print(f"\nPer hop and step: compute {statistics.median(computes):.2f} ms; round trip minus compute "
          f"{quantiles[49]:.2f} ms median, {quantiles[98]:.2f} ms p99 ({len(overheads)} samples). Floor: all float32 "
          f"weights, head included, read once a token: {floor:.1f} tokens/s")  # fmt: skip


if __name__ == "__main__":
    main()
