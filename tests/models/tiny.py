"""Tiny checkpoints with random weights, one per family, and the family's own full model to compare with.

Weights are scaled so that greedy tokens vary and the best logit stands clear of the second: the library's own
initialisation would repeat one token for ever, and identity of tokens would prove nothing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from petals.models.library_contract import DEFAULT_CACHE_NAME, pop_cache

VOCABULARY = 199
HIDDEN = 32
BLOCKS = 4

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GROUPED: Mapping[str, Any] = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 48}
_HEAD_DIM: Mapping[str, Any] = {**_GROUPED, "head_dim": 16}
_MOE: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


_DEEPSEEK: Mapping[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
_LINEAR: Mapping[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}
_MAMBA: Mapping[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}


@dataclass(frozen=True)
class Case:
    """One configuration of one family, and what about it the test proves."""

    id: str
    model_type: str
    proves: str
    settings: Mapping[str, Any] = field(repr=False)

    def config(self) -> PretrainedConfig:
        return AutoConfig.for_model(self.model_type, **self.settings)


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


CASES: tuple[Case, ...] = (
    Case("bloom", "bloom", "alibi, embedding norm, tied head", _COMMON),
    Case("llama", "llama", "grouped queries, rotary", _GROUPED),
    Case(
        "llama3-rope",
        "llama",
        "Llama 3.x rope scaling",
        {
            **_GROUPED,
            **_rope(
                "llama3",
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        },
    ),
    Case(
        "llama-dynamic-rope",
        "llama",
        "rope that depends on the length",
        {
            **_GROUPED,
            "max_position_embeddings": 8,
            **_rope("dynamic", factor=2.0),
        },
    ),
    Case("mistral", "mistral", "sliding window", {**_GROUPED, "sliding_window": 5}),
    Case("mixtral", "mixtral", "experts", {**_GROUPED, "num_local_experts": 4, "sliding_window": None}),
    Case(
        "falcon-new",
        "falcon",
        "new decoder: parallel attention, two norms",
        {
            **_COMMON,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "alibi": False,
            "bias": False,
        },
    ),
    Case(
        "falcon-7b",
        "falcon",
        "old decoder: parallel attention, one key head, rotary",
        {
            **_COMMON,
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
            "alibi": False,
        },
    ),
    Case(
        "falcon-rw",
        "falcon",
        "old decoder: alibi, sequential, biases",
        {
            **_COMMON,
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
    ),
    Case(
        "qwen2",
        "qwen2",
        "biased projections; sliding window in the upper blocks",
        {
            **_GROUPED,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
    Case("qwen3", "qwen3", "normed queries and keys", _HEAD_DIM),
    Case(
        "qwen3-moe",
        "qwen3_moe",
        "experts in every other block",
        {
            **_HEAD_DIM,
            **_MOE,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
        },
    ),
    Case("gemma", "gemma", "scaled embeddings, multi-query", {**_HEAD_DIM, "num_key_value_heads": 1}),
    Case(
        "gemma2",
        "gemma2",
        "soft-capping, alternating sliding window",
        {
            **_HEAD_DIM,
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
        },
    ),
    Case(
        "gemma3",
        "gemma3_text",
        "two rotary bases, sliding and full blocks",
        {
            **_HEAD_DIM,
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    Case("phi3", "phi3", "fused projections", {**_GROUPED, "sliding_window": None}),
    Case(
        "phi3-longrope",
        "phi3",
        "longrope: other frequencies for long sequences",
        {
            **_GROUPED,
            "sliding_window": None,
            "original_max_position_embeddings": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 8,
            },
        },
    ),
    Case("olmo2", "olmo2", "norms after attention and MLP", _GROUPED),
    Case("gpt-neox", "gpt_neox", "parallel residual, partial rotary", {**_COMMON, "intermediate_size": 48}),
    Case(
        "gpt2",
        "gpt2",
        "learned positions (added by the client)",
        {
            "vocab_size": VOCABULARY,
            "n_embd": HIDDEN,
            "n_layer": BLOCKS,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
    ),
    Case(
        "gpt2-by-depth",
        "gpt2",
        "attention scaled by the block's index",
        {
            "vocab_size": VOCABULARY,
            "n_embd": HIDDEN,
            "n_layer": BLOCKS,
            "n_head": 4,
            "n_positions": 128,
            "scale_attn_by_inverse_layer_idx": True,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
    ),
    Case("opt", "opt", "learned positions with an offset (added by the client)", {**_COMMON, "ffn_dim": 48}),
    Case(
        "mpt",
        "mpt",
        "alibi; a configuration that wants no cache",
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "n_layers": BLOCKS,
            "n_heads": 4,
            "max_seq_len": 128,
            "use_cache": False,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
    ),
    Case("olmo", "olmo", "norms without weights", _GROUPED),
    Case("nanochat", "nanochat", "norms without weights, squared ReLU", _GROUPED),
    Case(
        "granite-swa",
        "granite_swa",
        "a rotary base for each block, sliding and full blocks",
        {
            **_GROUPED,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    Case(
        "modernbert-decoder",
        "modernbert-decoder",
        "normed embeddings, sliding and full blocks",
        {
            **_COMMON,
            "intermediate_size": 48,
            "local_attention": 10,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    Case(
        "llama4",
        "llama4_text",
        "chunked attention, blocks without positions, experts",
        {
            **_HEAD_DIM,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 32,
            "no_rope_layers": [1, 1, 1, 0],
            "interleave_moe_layer_step": 2,
        },
    ),
    Case(
        "gpt-oss",
        "gpt_oss",
        "attention sinks, sliding and full blocks, experts with biases",
        {
            **_HEAD_DIM,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            **_rope("default"),
        },
    ),
    Case("deepseek-v3", "deepseek_v3", "compressed attention, a dense block, grouped experts", _DEEPSEEK),
    Case(
        "deepseek-v32",
        "deepseek_v32",
        "an indexer that chooses what attention sees",
        {**_DEEPSEEK, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64},
    ),
    Case(
        "qwen3-next",
        "qwen3_next",
        "gated delta rule in three of four blocks, experts",
        {**_HEAD_DIM, **_LINEAR, **_MOE, "shared_expert_intermediate_size": 24},
    ),
    Case("qwen3.5", "qwen3_5_text", "gated delta rule in three of four blocks", {**_HEAD_DIM, **_LINEAR}),
    Case(
        "granite-hybrid",
        "granitemoehybrid",
        "Mamba 2 blocks around one of attention",
        {
            **_GROUPED,
            **_MAMBA,
            "layer_types": ["mamba", "attention", "mamba", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
        },
    ),
    Case("falcon-h1", "falcon_h1", "attention and Mamba 2 side by side", {**_HEAD_DIM, **_MAMBA, "mamba_d_ssm": 64}),
    Case(
        "lfm2",
        "lfm2",
        "short convolutions around attention",
        {**_GROUPED, "layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
)


def make_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The family's own causal LM in float32 with lively weights."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    enliven(model, seed)
    return model.eval()


_ATTENTION = re.compile(r"q_proj|k_proj|qkv_proj|q_norm|k_norm")


def enliven(model: nn.Module, seed: int = 0) -> None:
    """Give every weight a scale at which blocks drown the embeddings, or models with tied heads repeat their input.

    Matrices are float16's numbers in float32, as those of published models are, which are kept that way
    (float16_weights.py).
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {
        id(m.weight): 0.3 / getattr(m, "scalar_embed_scale", 1.0)
        for m in model.modules()
        if isinstance(m, nn.Embedding)
    }
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if id(weight) in embeddings:
                weight.copy_(noise * embeddings[id(weight)])
            elif weight.ndim >= 2:
                gain = 1.5 if _ATTENTION.search(name) else 3  # sharp attention would amplify rounding
                weight.copy_((noise * gain / weight.shape[-1] ** 0.5).half())
            elif ("norm" in name or "ln" in name) and name.endswith("weight"):
                weight.add_(0.2 * noise)
            else:
                weight.copy_(0.2 * noise)


def save_tiny(
    case: Case, directory: Path, *, seed: int = 0, max_shard_size: str = "40KB", stored: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Write a sharded tiny checkpoint in `stored`; returns the full model that was written, in float32."""
    model = make_model(case.config(), seed).to(stored)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model.float()


class Reference:
    """The family's own full model, listened to at the doors of its blocks."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        base = model.base_model
        count = model.config.num_hidden_layers
        lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        self.layers = list(lists[0])
        owners = [(owner, name) for owner in base.modules() for name in dict(owner.named_children())]
        self._ropes = [
            (owner, name, copy.deepcopy(owner.get_submodule(name)))
            for owner, name in owners
            if hasattr(owner.get_submodule(name), "rope_type")
        ]

    def fresh(self) -> PreTrainedModel:
        """The model as if nothing had gone through it: some rotary embeddings remember how long the last text was."""
        for owner, name, pristine in self._ropes:
            setattr(owner, name, copy.deepcopy(pristine))
        return self.model

    def run(self, ids: Tensor, **kwargs: Any) -> tuple[list[Tensor], Any]:
        """The input of every block and, last, the output of the last one; and the library's own output."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        past = pop_cache(kwargs)
        if past is None:
            self.fresh()
        kwargs[DEFAULT_CACHE_NAME] = past

        def before(module: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]) -> None:
            inputs.append(args[0] if args else kw["hidden_states"])

        def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            outputs.append(out[0] if isinstance(out, tuple) else out)

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers]
        handles.append(self.layers[-1].register_forward_hook(after))
        try:
            result = self.model(input_ids=ids, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return [*inputs, outputs[-1]], result

    def run_in_steps(self, ids: Tensor, cuts: Sequence[int], **kwargs: Any) -> list[Tensor]:
        """As `run`, but through the library's own cache, cut at these tokens."""
        past, steps = None, []
        for begin, end in pairwise([0, *cuts, ids.shape[1]]):
            tensors, result = self.run(ids[:, begin:end], cache=past, use_cache=True, **kwargs)
            past = getattr(result, DEFAULT_CACHE_NAME)
            steps.append(tensors)
        return [torch.cat(list(parts), 1) for parts in zip(*steps, strict=True)]

    def gradients(self, ids: Tensor, hidden: Tensor, prompts: Tensor | None, weight: Tensor) -> tuple[Tensor, ...]:
        """d(sum(last output * weight)) by the first block's input and by the prompts added to each block's input."""
        hidden = hidden.detach().clone().requires_grad_()
        prompts = None if prompts is None else prompts.detach().clone().requires_grad_()

        def replace(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]) -> Any:
                value = args[0] if args else kw["hidden_states"]
                value = hidden if index == 0 else value
                if prompts is not None:
                    prefix = prompts.shape[2]
                    value = torch.cat([value[:, :prefix] + prompts[index], value[:, prefix:]], 1)
                return ((value, *args[1:]), kw) if args else (args, {**kw, "hidden_states": value})

            return hook

        handles = [layer.register_forward_pre_hook(replace(i), with_kwargs=True) for i, layer in enumerate(self.layers)]
        outputs: list[Tensor] = []
        handles.append(
            self.layers[-1].register_forward_hook(
                lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
            )
        )
        try:
            self.model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        inputs = [hidden] if prompts is None else [hidden, prompts]
        return outputs[-1].detach(), *torch.autograd.grad((outputs[-1] * weight).sum(), inputs)
