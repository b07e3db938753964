"""Models to measure with: the default one, and random weights in the shape of known ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
)

SHAPES: dict[str, PretrainedConfig | None] = {
    "smollm2": None,
    "bloom-560m": BloomConfig(hidden_size=1024, n_layer=24, n_head=16, vocab_size=250880),
    "llama-24x1024": LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=32000, max_position_embeddings=4096,
    ),
    "llama-2x1024": LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=1024, max_position_embeddings=4096,
    ),
    "llama-thin": LlamaConfig(
        hidden_size=1024, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=16, vocab_size=1024, max_position_embeddings=4096,
    ),
    "gemma3-270m": Gemma3TextConfig(
        hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, vocab_size=32000, sliding_window=512, max_position_embeddings=4096,
    ),
    "mixtral-12x512": MixtralConfig(
        hidden_size=512, intermediate_size=1792, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2,
        num_local_experts=8, vocab_size=32000, max_position_embeddings=4096,
    ),
}  # fmt: skip
"""None: the default model, real weights. The others have the shape of their namesakes and random weights;
llama-thin hardly computes, so that what is left is the way there and back."""
STORED = {"bloom-560m": torch.float16}
"""What the random weights are rounded to and stored in, as models of this shape are published; others: bfloat16."""


@contextmanager
def model_of(shape: str, stored: torch.dtype | None = None) -> Iterator[str | None]:
    """What to open; the directory of a random one lives as long as the context. `stored`: instead of the usual."""
    config = SHAPES[shape]
    if config is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(stored or STORED.get(shape, torch.bfloat16)).save_pretrained(
            directory
        )
        yield directory
