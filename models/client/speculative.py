"""Speculative decoding (Leviathan et al. 2023): a small model at home drafts, the swarm checks a draft in one step.

Only greedy decoding, where the result is the very tokens of plain greedy decoding: a drafted token stays if the large
model would have chosen it, and the first one that differs is replaced by the large model's own choice, which the same
step has computed (the "bonus" token when all were right). So every step yields at least one token. Rows of a batch go
on in step: as many tokens are kept as all unfinished rows agree on, since their caches have one common length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from petals.models.blocks.block import position_ids
from petals.models.client.causal_lm import GenerationMixin
from petals.models.client.decoding import next_logits
from petals.models.client.generation import ChainCache
from petals.models.errors import StepError
from petals.models.library_contract import cache_name, pop_cache, takes

FIRST_DRAFT = 4
LONGEST_DRAFT = 16


@dataclass(slots=True)
class SpeculationReport:
    """What the last `generate` drafted, counted in tokens per row."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Of the large model; 1 is plain decoding."""
        return self.tokens / max(1, self.steps)


class SpeculativeMixin(GenerationMixin):
    """`generate` with drafts by `small_model`, a local model with the same vocabulary."""

    small_model: PreTrainedModel
    speculation: SpeculationReport

    def use_drafts_of(self, small_model: Any) -> None:
        """Raises StepError for a model with another vocabulary."""
        this: Any = self
        ours, theirs = (model.get_input_embeddings().weight.shape[0] for model in (this, small_model))
        if ours != theirs:
            raise StepError(f"small_model knows {theirs} tokens, this model {ours}: drafts need the same vocabulary")
        object.__setattr__(self, "small_model", small_model)  # not a child: it is neither trained nor saved with us
        self.speculation = SpeculationReport()

    def generate(self, inputs: Tensor | None = None, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`, greedy only.

        Raises:
            StepError: sampling or beams were asked for.
        """
        loop = _Loop(_Drafter(self.small_model), streamer)
        self.speculation = loop.report
        return super().generate(inputs, *args, custom_generate=loop.run, **kwargs)


class _Drafter:
    """Greedy continuations of the small model, over a cache that follows the text."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache()
        self._takes_positions = takes(type(model).forward, "position_ids")
        self._cache_name = cache_name(type(model).forward)

    def draft(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """`length` tokens after `ids` (batch, tokens): (batch, length)."""
        start = ids.shape[1]
        if (wrong := self._cache.get_seq_length() - (start - 1)) > 0:
            self._cache.crop(-wrong)
        for _ in range(length):
            known = self._cache.get_seq_length()
            positions = {"position_ids": position_ids(mask)[:, known:]} if self._takes_positions else {}
            output: Any = self._model(
                input_ids=ids[:, known:],
                attention_mask=mask,
                use_cache=True,
                **{self._cache_name: self._cache},
                **positions,
            )
            ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
            mask = _longer(mask, 1)
        return ids[:, start:]


class _Loop:
    """One call of `generate`: the library prepares everything and hands it to `run`."""

    def __init__(self, drafter: _Drafter, streamer: Any) -> None:
        self.report = SpeculationReport()
        self._drafter = drafter
        self._streamer = streamer
        self._length = FIRST_DRAFT

    def run(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Stands for the library's decoding loop."""
        if generation_config.do_sample or generation_config.num_beams != 1:
            raise StepError("speculative decoding is greedy: leave do_sample and num_beams out")
        cache: ChainCache = pop_cache(model_kwargs)
        mask = model_kwargs.pop("attention_mask", None)
        mask = torch.ones_like(input_ids) if mask is None else mask
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        pad = _padding(generation_config)
        self._say(input_ids)
        while bool(unfinished.any()):
            draft_length = min(self._length, generation_config.max_length - input_ids.shape[1] - 1)
            drafts = self._drafter.draft(input_ids, mask, draft_length)
            chosen = self._check(model, cache, input_ids, mask, drafts, logits_processor)
            kept = _agreed(drafts, chosen, unfinished)
            self._adapt(draft_length, kept)
            for token in chosen[:, : kept + 1].unbind(1):
                token = torch.where(unfinished, token, token if pad is None else torch.full_like(token, pad))
                input_ids = torch.cat([input_ids, token[:, None]], dim=1)
                mask = _longer(mask, 1)
                self.report.tokens += 1
                unfinished &= ~stopping_criteria(input_ids, None)
                self._say(token)
                if not bool(unfinished.any()):
                    break
            cache.keep(input_ids.shape[1] - 1)
        if self._streamer is not None:
            self._streamer.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=cast("Any", input_ids))
        return input_ids

    def _check(
        self, model: Any, cache: ChainCache, ids: Tensor, mask: Tensor, drafts: Tensor, logits_processor: Any
    ) -> Tensor:
        """The large model's own choice at every drafted position and one more: (batch, drafts + 1)."""
        length = drafts.shape[1]
        together = torch.cat([ids, drafts], dim=1)
        logits = next_logits(model, cache, together, _longer(mask, length), last=length + 1)
        start = ids.shape[1]
        scores = [logits_processor(together[:, : start + index], logits[:, index]) for index in range(length + 1)]
        return torch.stack(scores, dim=1).argmax(-1)

    def _adapt(self, drafted: int, accepted: int) -> None:
        """Longer drafts while all of them are right, shorter ones after a miss: the rule of `transformers`."""
        self.report.steps += 1
        self.report.drafted += drafted
        self.report.accepted += accepted
        if drafted:
            self._length = min(LONGEST_DRAFT, self._length + 2) if accepted == drafted else max(1, self._length - 1)

    def _say(self, tokens: Tensor) -> None:
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())


def _padding(config: Any) -> int | None:
    """What stands behind the end of a row that is finished: as the library chooses it."""
    ends = config.eos_token_id
    first = ends[0] if isinstance(ends, (list, tuple)) and ends else ends
    padding: int | None = first if config.pad_token_id is None else config.pad_token_id
    return padding


def _agreed(drafts: Tensor, chosen: Tensor, unfinished: Tensor) -> int:
    """How many drafted tokens all unfinished rows keep."""
    right = (drafts == chosen[:, :-1]) | ~unfinished[:, None]
    return int(right.all(0).long().cumprod(0).sum())


def _longer(mask: Tensor, tokens: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), tokens)], dim=1)
