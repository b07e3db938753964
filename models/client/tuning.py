"""What a client trains at home while the blocks stay frozen in the swarm: prompts, and low-rank updates of the blocks.

Prompt tuning (Lester et al. 2021) puts trainable vectors in front of the embedded text ("ptune"); its deep variant (Liu
et al. 2021, P-tuning v2) also adds one to the input of every block at those positions ("deep_ptune"). LoRA (Hu et al.
2021) trains a low-rank update of linear layers inside the blocks ("lora"): the factors live here, travel with each
request, and their gradients come back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from petals.models.blocks.adapters import Lora, LowRank, linear_features, refuse_unsupported
from petals.models.errors import StepError
from petals.models.source.loading import skeleton_blocks

TuningMode = Literal["ptune", "deep_ptune", "lora"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Which layers are updated, and how."""

    rank: int = 8
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Last names of linear layers of a block ("q_proj"). Empty: the queries' and values' where they are layers of their
    own, else all of the attention's."""
    blocks: range | None = None
    """Which blocks; None: all."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise StepError(f"the rank of a low-rank update must be at least 1, got {self.rank}")

    @classmethod
    def of_peft(cls, config: Any) -> LoraSettings:
        """The same, said as a `peft.LoraConfig`. Raises CheckpointError for options that the swarm cannot apply."""
        said: Mapping[str, Any] = config.to_dict()
        refuse_unsupported(said, "lora_config")
        targets = said.get("target_modules") or ()
        blocks = said.get("layers_to_transform")
        if isinstance(targets, str) or not isinstance(blocks, (list, type(None))):
            raise StepError("lora_config: give target_modules and layers_to_transform as lists")
        chosen = range(min(blocks), max(blocks) + 1) if blocks else None
        if blocks and sorted(blocks) != list(chosen or ()):
            raise StepError(f"lora_config: layers_to_transform must follow one another, got {blocks}")
        rank = int(said["r"])
        alpha = float(said["lora_alpha"]) * (rank**0.5 if said.get("use_rslora") else 1.0)
        return cls(rank=rank, alpha=alpha, targets=tuple(sorted(targets)), blocks=chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What of a model is trained at home; None: nothing but a new head."""

    mode: TuningMode | None = None
    pre_seq_len: int = 16
    """Length of the trained prompt in tokens, for "ptune" and "deep_ptune"."""
    lora: LoraSettings = LoraSettings()

    def __post_init__(self) -> None:
        if self.mode not in (None, "ptune", "deep_ptune", "lora"):
            raise StepError(f"unknown tuning_mode {self.mode!r}: choose ptune, deep_ptune or lora")
        if self.mode in ("ptune", "deep_ptune") and self.pre_seq_len < 1:
            raise StepError(f"tuning_mode {self.mode!r} needs pre_seq_len of at least 1, got {self.pre_seq_len}")


class LoraFactors(nn.Module):
    """The factors of a client's own low-rank updates, float32: A random and B zero, so that training starts from the
    model as it is (Hu et al. 2021, section 4.1)."""

    def __init__(self, settings: LoraSettings, shapes: Mapping[tuple[int, str], tuple[int, int]]) -> None:
        """`shapes`: (block, path of a linear layer in it) -> (in_features, out_features)."""
        super().__init__()
        self.settings = settings
        self.factors = nn.ParameterDict()
        self._places: dict[tuple[int, str], str] = {}
        for (block, path), (wide_in, wide_out) in shapes.items():
            key = f"{block}/{path.replace('.', '/')}"
            self._places[block, path] = key
            a = torch.empty(settings.rank, wide_in)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            self.factors[f"{key}/A"] = nn.Parameter(a)
            self.factors[f"{key}/B"] = nn.Parameter(torch.zeros(wide_out, settings.rank))

    def pairs(self) -> dict[tuple[int, str], tuple[nn.Parameter, nn.Parameter]]:
        """(block, path) -> (A, B)."""
        return {place: (self.factors[f"{key}/A"], self.factors[f"{key}/B"]) for place, key in self._places.items()}

    def as_lora(self) -> Lora:
        """What a chain takes; the factors are the parameters themselves."""
        scaling = self.settings.alpha / self.settings.rank
        return Lora("trained here", {place: LowRank(a, b, scaling) for place, (a, b) in self.pairs().items()})


def new_factors(settings: LoraSettings, config: PretrainedConfig) -> LoraFactors:
    """Factors for blocks that are not here: their shapes come from the configuration alone.

    Raises:
        StepError: no block has a layer of one of the names.
    """
    blocks = skeleton_blocks(config)
    chosen = settings.blocks or range(len(blocks))
    shapes: dict[tuple[int, str], tuple[int, int]] = {}
    for index in chosen:
        linear = linear_features(blocks[index])
        for path in _targets(settings.targets, linear):
            shapes[index, path] = linear[path]
    if not shapes:
        known = sorted({path.rpartition(".")[2] for path in linear_features(blocks[0])})
        raise StepError(f"no layer of a block is called {', '.join(settings.targets)}; there are {', '.join(known)}")
    return LoraFactors(settings, shapes)


def _targets(names: tuple[str, ...], linear: Mapping[str, Any]) -> list[str]:
    if names:
        return [path for path in linear if path.rpartition(".")[2] in names or path in names]
    return [path for path in linear if path.endswith(("q_proj", "v_proj"))] or [
        path for path in linear if "attn" in path or "attention" in path
    ]


def add_tuning(base: Any, tuning: Tuning, config: PretrainedConfig, num_blocks: int) -> None:
    """Freeze a base model and give it what `tuning` trains, under Petals' names.

    `prompt_embeddings`: (pre_seq_len, hidden_size), started from embeddings of random tokens, which trains faster than
    noise (Lester et al. 2021, section 3.2). `intermediate_prompt_embeddings`: (pre_seq_len, blocks * hidden_size),
    started at zero. `lora`: `LoraFactors`. All float32, whatever the model computes in: small updates need the bits.
    """
    base.requires_grad_(False)
    if tuning.mode in ("ptune", "deep_ptune"):
        words: Tensor = base.get_input_embeddings().weight
        start = words[torch.randint(words.shape[0], (tuning.pre_seq_len,))].detach().float()
        base.prompt_embeddings = nn.Embedding(tuning.pre_seq_len, start.shape[1], _weight=start)
        if tuning.mode == "deep_ptune":
            zeros = torch.zeros(tuning.pre_seq_len, num_blocks * start.shape[1])
            base.intermediate_prompt_embeddings = nn.Embedding(tuning.pre_seq_len, zeros.shape[1], _weight=zeros)
    elif tuning.mode == "lora":
        base.lora = new_factors(tuning.lora, config)


def prompt_length(base: Any) -> int:
    """Trained tokens in front of every text."""
    table: nn.Embedding | None = getattr(base, "prompt_embeddings", None)
    return 0 if table is None else table.num_embeddings


def get_prompt(base: Any, batch_size: int) -> tuple[Tensor, Tensor | None]:
    """The trained prompt (batch, pre_seq_len, hidden_size), and what is added to every block's input there,
    (blocks, batch, pre_seq_len, hidden_size), or None."""
    prompt: Tensor = base.prompt_embeddings.weight
    length, size = prompt.shape
    table: nn.Embedding | None = getattr(base, "intermediate_prompt_embeddings", None)
    deep = None
    if table is not None:
        deep = table.weight.view(length, -1, 1, size).permute(1, 2, 0, 3).expand(-1, batch_size, -1, -1)
    return prompt.expand(batch_size, -1, -1), deep


def lora_of(base: Any) -> Lora | None:
    """The low-rank updates trained here, or None."""
    factors: LoraFactors | None = getattr(base, "lora", None)
    return None if factors is None else factors.as_lora()
