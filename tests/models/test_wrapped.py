"""Checkpoints of vision-language models: servers hold the text blocks, clients open them for text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.local import LocalChain
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from tests.models.tiny import enliven

TEXT = {
    "vocab_size": 199,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}
WRAPPED: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            **TEXT,
            "model_type": "gemma3_text",
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 1,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
    },
}


@pytest.mark.parametrize("model_type", sorted(WRAPPED))
@torch.no_grad()
def test_the_text_is_that_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **WRAPPED[model_type])
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    enliven(whole)
    whole.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    spans = [load_span(checkpoint, blocks, dtype=torch.float32) for blocks in (range(1), range(1, 3))]
    ours = load_causal_lm(checkpoint, LocalChain(spans), dtype=torch.float32)
    ids = torch.randint(10, 199, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    said = [model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False) for model in (ours, whole)]
    assert torch.equal(*said)
    assert not any("vision" in name for name, _ in ours.named_parameters())
