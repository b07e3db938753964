"""A miniature of a model's family: the same architecture with a few small layers, made in milliseconds.

The client checks the installed `transformers` with one before it trusts it (client_check.py). What makes a family
itself - attention kinds, norms, rotary embeddings, routing, tied heads - stays as the configuration says; only sizes
shrink.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from petals.models.blocks.model_views import config_slice

HEADS, HEAD_SIZE, HIDDEN, VOCABULARY, MOST_LAYERS = 4, 16, 64, 128, 8
LONGEST_TEXT = 64

_SIZES: Mapping[str, int] = {
    "hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "head_dim": HEAD_SIZE,
    "num_attention_heads": HEADS,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "rotary_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 6,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": HEAD_SIZE,
    "linear_value_head_dim": HEAD_SIZE,
    "linear_num_heads": 4,
    "linear_head_dim": HEAD_SIZE,
    "lru_width": HIDDEN,
}
"""The largest values that a miniature has of these; smaller ones and None stay."""


def miniature(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a text model, made small.

    Raises: what the family's configuration raises for sizes that it does not take.
    """
    config = copy.deepcopy(config.get_text_config(decoder=True))
    config = config_slice(config, range(_layers_wanted(config)))
    heads = getattr(config, "num_attention_heads", 1)
    key_heads = {name: getattr(config, name, None) for name in ("num_key_value_heads", "num_kv_heads")}
    # DeepSeek's and what came of it: `head_dim` is the rotary part's
    rotary_heads = getattr(config, "qk_rope_head_dim", None) == (getattr(config, "head_dim", None) or 0)
    rotary = getattr(config, "head_dim", None) or config.hidden_size // heads
    for name, largest in _SIZES.items():
        value = getattr(config, name, None)
        if type(value) is int and value > largest:
            setattr(config, name, largest)
    if rotary_heads:
        config.head_dim = config.qk_rope_head_dim
    for name, count in key_heads.items():
        if count is not None:
            setattr(config, name, HEADS if count >= heads else min(count, HEADS // 2))
    head_size = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)
    _shrink_rope(getattr(config, "rope_parameters", None), rotary, head_size)
    _move_switch(config)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, None
    for name in ("quantization_config", "dtype"):
        if getattr(config, name, None) is not None:
            delattr(config, name)
    return config


def _layers_wanted(config: PretrainedConfig) -> int:
    """As few first layers as have every kind of layer, at least two."""
    kinds = list(getattr(config, "layer_types", None) or [])
    wanted = max((kinds.index(kind) + 1 for kind in set(kinds)), default=0)
    return int(min(config.num_hidden_layers, MOST_LAYERS, max(2, wanted)))


def _shrink_rope(rope: Any, old: int, new: int) -> None:
    """Cut lists that have one entry for each frequency (longrope's factors) to those of the smaller head."""
    if not isinstance(rope, dict):
        return
    for name, value in rope.items():
        if isinstance(value, dict):
            _shrink_rope(value, old, new)
        elif isinstance(value, list) and name != "mrope_section":
            rope[name] = value[: len(value) * new // old]
        elif name == "mrope_section":
            share = [max(1, part * new // old) for part in value]
            rope[name] = [new // 2 - sum(share[1:]), *share[1:]]


def _move_switch(config: PretrainedConfig) -> None:
    """Longrope changes frequencies at a length that no text of the check may cross: a roll-back over it is not exact
    in `transformers` either."""
    for owner in (vars(config), getattr(config, "rope_parameters", None) or {}):
        name = "original_max_position_embeddings"
        if owner.get(name) is not None:
            owner[name] = max(owner[name], LONGEST_TEXT)


_ATTENTION = re.compile(r"q_proj|k_proj|qkv|query|q_norm|k_norm")


def lively_weights(skeleton: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A float32 state dict for a model without memory, at scales at which its greedy tokens vary.

    Drawn with a generator of its own: other threads may be drawing from torch's.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in skeleton.modules() if isinstance(m, nn.Embedding)}
    state: dict[str, Tensor] = {}
    for name, weight in skeleton.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if id(weight) in embeddings:
            state[name] = 0.3 * noise
        elif weight.ndim >= 2:  # sharp attention would amplify rounding
            state[name] = noise * ((1.5 if _ATTENTION.search(name) else 3.0) / weight.shape[-1] ** 0.5)
        elif "norm" in name and name.endswith("weight"):
            state[name] = 1 + 0.2 * noise
        else:
            state[name] = 0.2 * noise
    return state
