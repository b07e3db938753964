"""Seconds of a training step (forward, backward, optimizer): one process with PEFT-like tuning, a swarm of two servers.

    python benchmarks/training.py [--batch 4] [--length 64] [--rounds 5]

The reference is the same tuning over the same blocks at home (`LocalChain`), which the tests prove equal to PEFT.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from servers import table, take_turns, two_servers

from petals import AutoDistributedModelForCausalLM, LoraSettings, connect
from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.local import LocalChain
from petals.models.client.tuning import Tuning
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    """One training step."""
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def contestant(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """A step of `model` with an optimizer of its own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return partial(step, model, torch.optim.AdamW(trained, lr=1e-4), ids)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    checkpoint = open_checkpoint()
    ids = torch.randint(1000, (options.batch, options.length), generator=torch.Generator().manual_seed(0))
    blocks = range(checkpoint.num_blocks)
    chain = LocalChain(load_span(checkpoint, blocks, dtype=torch.float32))
    lora = LoraSettings(rank=4)
    print(f"{checkpoint.name}, float32, {torch.get_num_threads()} threads, {options.batch} x {options.length} tokens, "
          f"{options.rounds} rounds\n")  # fmt: skip
    with two_servers(checkpoint.num_blocks) as address, connect(address) as peer:
        for mode in ("ptune", "deep_ptune", "lora"):
            home = load_causal_lm(checkpoint, chain, dtype=torch.float32, tuning=Tuning(mode=mode, lora=lora))
            remote = AutoDistributedModelForCausalLM.from_pretrained(peer=peer, tuning_mode=mode, lora_config=lora)
            seconds = take_turns(
                {"one process": contestant(home, ids), "swarm, two servers": contestant(remote, ids)}, options.rounds
            )
            print(table(f"training step, {mode}", seconds, 1.0, "steps/s") + "\n")


if __name__ == "__main__":
    main()
