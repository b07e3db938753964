"""Which architectures are known, and what a new one has to say about itself.

The block contract is generic (see loading.py): a family needs no line of code here to be served. The table names the
families that the tests prove exact, so that the self-test at load time may be short for them and the documentation can
list them; `register_family` adds an architecture from user code (docs/custom-model.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from transformers import MODEL_MAPPING, PretrainedConfig, PreTrainedModel

from petals.models.errors import UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is known about one `model_type`."""

    model_type: str
    """As in config.json."""
    title: str
    """For people."""
    base_class: type[PreTrainedModel] | None = None
    """The model without head. None: the one `transformers.AutoModel` would build."""
    layers: str | None = None
    """Where the list of blocks is in the base model ("layers", "decoder.layers"). None: looked for."""
    verified: bool = False
    """Proven exact by this project's tests: the self-test is short."""


_FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="bloom", title="BLOOM", verified=True),
        Family(model_type="llama", title="Llama 1-3.x, SmolLM2", verified=True),
        Family(model_type="mistral", title="Mistral", verified=True),
        Family(model_type="mixtral", title="Mixtral", verified=True),
        Family(model_type="falcon", title="Falcon", verified=True),
        Family(model_type="qwen2", title="Qwen2, Qwen2.5", verified=True),
        Family(model_type="qwen3", title="Qwen3", verified=True),
        Family(model_type="qwen3_moe", title="Qwen3-MoE", verified=True),
        Family(model_type="gemma", title="Gemma", verified=True),
        Family(model_type="gemma2", title="Gemma 2", verified=True),
        Family(model_type="gemma3_text", title="Gemma 3 (text)", verified=True),
        Family(model_type="phi3", title="Phi-3, Phi-4", verified=True),
        Family(model_type="olmo2", title="OLMo 2", verified=True),
        Family(model_type="gpt_neox", title="GPT-NeoX, Pythia", verified=True),
        Family(model_type="gpt2", title="GPT-2", verified=True),
        Family(model_type="opt", title="OPT", verified=True),
        Family(model_type="mpt", title="MPT", verified=True),
        Family(model_type="olmo", title="OLMo 1", verified=True),
        Family(model_type="nanochat", title="nanochat", verified=True),
        Family(model_type="granite_swa", title="Granite SWA", verified=True),
        Family(model_type="modernbert-decoder", title="ModernBERT decoder", verified=True),
        Family(model_type="llama4_text", title="Llama 4 (text)", verified=True),
        Family(model_type="gpt_oss", title="gpt-oss", verified=True),
        Family(model_type="deepseek_v3", title="DeepSeek V3, Kimi K2", verified=True),
        Family(model_type="deepseek_v32", title="DeepSeek V3.2", verified=True),
        Family(model_type="qwen3_next", title="Qwen3-Next", verified=True),
        Family(model_type="qwen3_5_text", title="Qwen3.5 (text)", verified=True),
        Family(model_type="granitemoehybrid", title="Granite 4 hybrid", verified=True),
        Family(model_type="falcon_h1", title="Falcon-H1", verified=True),
        Family(model_type="lfm2", title="LFM2", verified=True),
    )
}


def families() -> tuple[Family, ...]:
    """All families, in the order of their registration."""
    return tuple(_FAMILIES.values())


def register_family(family: Family) -> None:
    """Add an architecture, or replace what is known about one. Raises ValueError for a nameless one."""
    if not family.model_type:
        raise ValueError("a family needs the model_type that its config.json carries")
    _FAMILIES[family.model_type] = family


def family_of(config: PretrainedConfig) -> Family:
    """The family of a configuration; one that nobody listed is described by its model_type alone."""
    return _FAMILIES.get(config.model_type) or Family(model_type=config.model_type, title=config.model_type)


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without head in one with a head. Some classes name a prefix that is no child of theirs (Llama 4's)."""
    base = getattr(model, model.base_model_prefix, model)
    wanted = base_class_of(model.config)
    if base is not model or isinstance(model, wanted):
        return cast("PreTrainedModel", base)
    return next((child for child in model.modules() if isinstance(child, wanted)), model)


def base_class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of the model without head. Raises UnsupportedModel when `transformers` has none."""
    known = family_of(config).base_class
    if known is not None:
        return known
    try:
        found = MODEL_MAPPING[type(config)]
    except KeyError:
        raise UnsupportedModel(
            f"transformers has no model for {config.model_type!r}; register its class (docs/custom-model.md)"
        ) from None
    return cast("type[PreTrainedModel]", found[0] if isinstance(found, (tuple, list)) else found)
