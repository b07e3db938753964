"""Tokens per second of forward passes: plain transformers in one process, a swarm of two servers; in one run.

    python benchmarks/forward.py [--batch 8] [--length 128] [--rounds 5]

The swarm's logits are checked against those of plain transformers first. Hidden states travel in float32, float16 and
int8; the bytes per token and the error of the logits stand beside the speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from servers import table, take_turns, two_servers
from transformers import AutoModelForCausalLM

from petals import AutoDistributedModelForCausalLM, connect
from petals.models.source.checkpoint import open_checkpoint
from petals.protocols.tensors import COMPRESSIONS, encode_tensor


def run(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits."""
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    checkpoint = open_checkpoint()
    generator = torch.Generator().manual_seed(0)
    size = checkpoint.config.vocab_size
    ids = torch.randint(size, (options.batch, options.length), generator=generator)
    plain = AutoModelForCausalLM.from_pretrained(str(checkpoint.directory), dtype=torch.float32).eval()
    contestants: dict[str, Callable[[], object]] = {"plain transformers, one process": partial(run, plain, ids)}
    expected = run(plain, ids)
    lines = ["| compression | bytes per token and hop, one way | logits: largest error, share of same first choices |",
             "|---|---|---|"]  # fmt: skip
    with two_servers(checkpoint.num_blocks) as address, connect(address) as peer:
        for compression, encoding in COMPRESSIONS.items():
            model = AutoDistributedModelForCausalLM.from_pretrained(peer=peer, compression=compression)
            contestants[f"swarm, compression {compression}"] = partial(run, model, ids)
            logits = run(model, ids)
            _, pieces = encode_tensor(torch.zeros(1, 1, checkpoint.hidden_size), encoding)
            error = float((logits - expected).abs().max())
            same = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
            lines.append(f"| {compression} | {sum(piece.nbytes for piece in pieces):,} | {error:.2g}, {same:.1%} |")
        assert torch.allclose(run(model, ids), logits)
        seconds = take_turns(contestants, options.rounds)
    print(f"{checkpoint.name}, float32, {torch.get_num_threads()} threads, {options.batch} x {options.length} tokens, "
          f"{options.rounds} rounds\n")  # fmt: skip
    print(table("forward, head included", seconds, ids.numel(), "tokens/s"))
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
