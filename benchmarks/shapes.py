"""Models to measure with: the default one, and random weights in the shape of known ones."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, PretrainedConfig

SHAPES: dict[str, PretrainedConfig | None] = {
    "smollm2": None,
    "bloom-560m": BloomConfig(hidden_size=1024, n_layer=24, n_head=16, vocab_size=250880),
    "llama-24x1024": LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=32000, max_position_embeddings=4096,
    ),
}  # fmt: skip
"""None: the default model, real weights. The others have the shape of their namesakes and random weights."""


@contextmanager
def model_of(shape: str) -> Iterator[str | None]:
    """What to open; the directory of a random one lives as long as the context."""
    config = SHAPES[shape]
    if config is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        yield directory


def gigaflops(hidden: int, rows: int = 512) -> float:
    """Of a float32 matrix product on this machine, now: the limit of a server that computes for many."""
    return 2 * rows * hidden * 4 * hidden / _best(torch.randn(rows, hidden), torch.randn(4 * hidden, hidden)) / 1e9


def gigabytes(hidden: int, total: int = 512 << 20) -> float:
    """Of weights read per second by one row's products with more than caches hold: the limit of one user."""
    weights = [torch.full((4 * hidden, hidden), 0.1) for _ in range(total // (16 * hidden * hidden))]
    return weights[0].nbytes / _best(torch.randn(1, hidden), *weights) / 1e9


def _best(rows: torch.Tensor, *weights: torch.Tensor) -> float:
    """Seconds of one product, the best of ten rounds over all weights."""
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(rows, weight)
        seconds.append((time.perf_counter() - started) / len(weights))
    return min(seconds)
