"""Files of what was trained at home, in PEFT's formats: other programs read them, and servers host the LoRA ones.

- "ptune": PEFT's PROMPT_TUNING, tensor `prompt_embeddings`. "deep_ptune" has no counterpart in PEFT (its prefix tuning
  trains keys and values); the same file carries `intermediate_prompt_embeddings` too, and PEFT refuses it by name.
- "lora": PEFT's LORA.
- A classifier's head goes in beside them, as PEFT's `modules_to_save`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from petals.models.blocks.adapters import CONFIG, WEIGHTS
from petals.models.client.tuning import LoraFactors
from petals.models.errors import CheckpointError, StepError

PROMPT = "prompt_embeddings"
DEEP_PROMPT = "intermediate_prompt_embeddings"
HEAD = "score"


def save_trained(model: Any, base: Any, directory: Path) -> None:
    """Write the configuration and the tensors. Raises StepError when nothing is trained here."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in _trained(model, base).items()}
    if not tensors:
        raise StepError("nothing is trained here: open the model with tuning_mode, or as a sequence classifier")
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(_config(model, base), indent=2) + "\n")


def load_trained(model: Any, base: Any, directory: Path) -> None:
    """Read the tensors into the places they were trained in. Raises CheckpointError when they are others."""
    try:
        found = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} holds no {WEIGHTS} that can be read: {error}") from error
    wanted = _trained(model, base)
    if strange := sorted(set(wanted) ^ set(found)):
        raise CheckpointError(f"{directory} was trained otherwise: {strange[0]} is only on one side")
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            shapes = f"{tuple(found[name].shape)}, here {tuple(tensor.shape)}"
            raise CheckpointError(f"{directory}: {name} has the shape {shapes}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def _trained(model: Any, base: Any) -> dict[str, Tensor]:
    """Every trained tensor, itself, by its name in the file."""
    tensors: dict[str, Tensor] = {}
    for name in (PROMPT, DEEP_PROMPT):
        table: nn.Embedding | None = getattr(base, name, None)
        if table is not None:
            tensors[name] = table.weight
    prefix = "base_model.model." if _lora(base) is not None else "base_model."
    for name, factor in _lora_tensors(model, base).items():
        tensors[f"base_model.model.{name}"] = factor
    head: nn.Module | None = getattr(model, HEAD, None)
    if head is not None:
        for name, parameter in head.named_parameters():
            tensors[f"{prefix}{HEAD}.{name}"] = parameter
    return tensors


def _lora(base: Any) -> LoraFactors | None:
    found: LoraFactors | None = getattr(base, "lora", None)
    return found


def _lora_tensors(model: Any, base: Any) -> dict[str, Tensor]:
    """The factors by the names that PEFT gives them: the path of the layer in the model of the family."""
    factors = _lora(base)
    if factors is None:
        return {}
    path = next(name for name, module in model.named_modules() if module is model.blocks)
    return {
        f"{path}.{block}.{layer}.lora_{side}.weight": factor
        for (block, layer), pair in factors.pairs().items()
        for side, factor in zip("AB", pair, strict=True)
    }


def _config(model: Any, base: Any) -> Mapping[str, Any]:
    """`adapter_config.json`."""
    head = getattr(model, HEAD, None)
    config: dict[str, Any] = {
        "base_model_name_or_path": model.name_or_path or None,
        "inference_mode": True,
        "modules_to_save": None if head is None else [HEAD],
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
    }
    factors = _lora(base)
    if factors is not None:
        settings = factors.settings
        paths = sorted({path.rpartition(".")[2] for _, path in factors.pairs()})
        blocks = sorted({block for block, _ in factors.pairs()})
        return config | {
            "peft_type": "LORA",
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": paths,
            "layers_to_transform": None if settings.blocks is None else blocks,
        }
    table: nn.Embedding | None = getattr(base, PROMPT, None)
    size = model.config.get_text_config(decoder=True)
    return config | {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 0 if table is None else table.num_embeddings,
        "token_dim": size.hidden_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": size.num_attention_heads,
        "num_layers": size.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",
    }
