"""A decode loop of our own, on public ground: `forward`, logits processors and stopping criteria of `transformers`.

Theory. `transformers.generate` prepares masks, caches and processors in private methods that change with every release.
What a decode step needs is little: the logits of the last position, processors that change them, a choice, and a rule
when to stop. All of that is public, so `peer.generate`, the gateway and the terminal decode here. The tokens are those
of `transformers.generate`: greedy takes the first largest logit, sampling draws with `torch.multinomial` from the
softmax of what the processors leave, in the order in which the library applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from petals.models.blocks.block import position_ids
from petals.models.client.drafts import TextDrafter
from petals.models.client.generation import ChainCache
from petals.models.library_contract import cache_name, takes

DEFAULT_TOP_K = 50
"""What `transformers.generate` samples from when nothing says how many tokens (its documentation)."""

Choose = Callable[[Tensor], Tensor]
"""Scores (batch, vocabulary) float32 -> tokens (batch,) int64."""

UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "guidance_scale": (None, 1, 1.0),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "constraints": (None,),
    "force_words_ids": (None,),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "watermarking_config": (None,),
    "top_h": (None,),
    "token_healing": (None, False),
}
"""Settings of a `generation_config.json` that this loop does not follow, and the values that ask for nothing."""


def ignored_settings(config: GenerationConfig) -> list[str]:
    """`name=value` of each setting of a model's `generation_config.json` that a single stream of tokens leaves out:
    beams, several answers, drafts. `model.generate` of the PyTorch client follows them."""
    found = ((name, getattr(config, name, None)) for name in UNSUPPORTED)
    return [f"{name}={value}" for name, value in found if value not in UNSUPPORTED[name]]


def processors_of(
    config: GenerationConfig, *, prompt_length: int, max_length: int, ends: Sequence[int], more: Sequence[Any] = ()
) -> LogitsProcessorList:
    """The logits processors that `transformers.generate` applies for these settings, in its order.

    Args:
        prompt_length: tokens of the prompt.
        max_length: tokens at which generation ends, prompt included.
        ends: tokens that end an answer.
        more: processors of the caller, between those of the settings and those that only sampling has.
    """
    processors = [
        *_penalties(config),
        *_length_rules(config, prompt_length, max_length, list(ends)),
        *more,
    ]
    if config.do_sample:
        processors += _warpers(config)
    if config.renormalize_logits:
        processors.append(LogitNormalization())
    return LogitsProcessorList(processors)


def _penalties(config: GenerationConfig) -> list[LogitsProcessor]:
    made: list[LogitsProcessor] = []
    if config.sequence_bias is not None:
        made.append(SequenceBiasLogitsProcessor(sequence_bias=config.sequence_bias))
    if config.repetition_penalty not in (None, 1.0):
        made.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        made.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    return made


def _length_rules(
    config: GenerationConfig, prompt_length: int, max_length: int, ends: list[int]
) -> list[LogitsProcessor]:
    made: list[LogitsProcessor] = []
    if config.bad_words_ids is not None:
        made.append(NoBadWordsLogitsProcessor(config.bad_words_ids, ends or None))
    if ends and config.min_length:
        made.append(MinLengthLogitsProcessor(config.min_length, ends))
    if ends and config.min_new_tokens:
        made.append(MinNewTokensLengthLogitsProcessor(prompt_length, config.min_new_tokens, ends))
    if config.forced_bos_token_id is not None:
        made.append(ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        made.append(ForcedEOSTokenLogitsProcessor(max_length, config.forced_eos_token_id))
    if config.remove_invalid_values:
        made.append(InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty is not None:
        made.append(ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, ends, prompt_length))
    if config.suppress_tokens is not None:
        made.append(SuppressTokensLogitsProcessor(config.suppress_tokens))
    if config.begin_suppress_tokens is not None:
        first = prompt_length + (prompt_length == 1 and config.forced_bos_token_id is not None)
        made.append(SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, first))
    return made


def _warpers(config: GenerationConfig) -> list[LogitsProcessor]:
    """What narrows down a draw."""
    made: list[LogitsProcessor] = []
    if config.temperature not in (None, 1.0):
        made.append(TemperatureLogitsWarper(config.temperature))
    top_k = DEFAULT_TOP_K if config.top_k is None else config.top_k
    if top_k:
        made.append(TopKLogitsWarper(top_k))
    if config.top_p is not None and config.top_p < 1:
        made.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        made.append(MinPLogitsWarper(config.min_p))
    if config.typical_p is not None and config.typical_p < 1:
        made.append(TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff is not None and 0 < config.epsilon_cutoff < 1:
        made.append(EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff is not None and 0 < config.eta_cutoff < 1:
        made.append(EtaLogitsWarper(config.eta_cutoff))
    return made


def criteria_of(
    config: GenerationConfig, *, ends: Sequence[int], tokenizer: Any, more: Sequence[Any] = ()
) -> StoppingCriteriaList:
    """What ends an answer before its last token: its ends, and the settings' time limit and stop strings."""
    made: list[Any] = []
    if config.max_time is not None:
        made.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings:
        made.append(StopStringCriteria(tokenizer, config.stop_strings))
    if ends:
        made.append(EosTokenCriteria(list(ends)))
    return StoppingCriteriaList([*made, *more])


def greedy(scores: Tensor) -> Tensor:
    """The likeliest token of each row; of equal ones the first."""
    return scores.argmax(-1)


class Draw:
    """Draws a token of each row, with a random generator of its own: torch's global one is shared by all threads."""

    def __init__(self, seed: int | None, device: torch.device | str = "cpu") -> None:
        """`seed`: the draws are those of `transformers.generate` after `torch.manual_seed(seed)`; None: of chance."""
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, scores: Tensor) -> Tensor:
        chances = torch.softmax(scores, dim=-1)
        return torch.multinomial(chances, num_samples=1, generator=self._generator)[:, 0]


def _length_changes_angles(config: Any) -> bool:
    """Whether rotary angles depend on how long the text is in a step: then a draft changes them."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))]
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def _rope_switch(config: Any) -> int | None:
    """The length after which a text is computed anew, with other rotary frequencies: what `transformers` does for
    Phi-3's longrope, whose frequencies for long texts fit no keys that were computed with those for short ones."""
    if config.model_type not in ("phi3", "phimoe", "phi4_multimodal"):
        return None
    switch: int | None = getattr(config, "original_max_position_embeddings", None)
    return switch


@dataclass(frozen=True, slots=True)
class Rules:
    """How the next token is chosen from its logits, and when a text ends."""

    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    choose: Choose = greedy

    def take(self, text: Tensor, end: int, logits: Tensor, on_token: Callable[[int], None]) -> bool:
        """Write the token after the first `end` of `text` (1, tokens) into it; whether that ends the text.

        `logits`: (1, vocabulary) float32.
        """
        known: Any = text[:, :end]
        scores = self.processors(known, cast("torch.FloatTensor", logits))
        text[:, end] = self.choose(scores)
        on_token(int(text[0, end]))
        known = text[:, : end + 1]
        return bool(self.criteria(known, scores).all())


@torch.no_grad()
def next_logits(model: Any, cache: ChainCache, ids: Tensor, mask: Tensor | None = None, *, last: int = 1) -> Tensor:
    """One step of `model`: all tokens of `ids` that its cache has not seen.

    Args:
        ids: (batch, tokens) int64, the whole text.
        mask: (batch, tokens), 1 = a real token; None: all real.
        last: positions wanted, counted from the end.
    Returns: (batch, last, vocabulary) float32 logits.
    """
    forward = type(model).forward
    switch = _rope_switch(model.config)
    if switch is not None and cache.get_seq_length() <= switch < ids.shape[1]:
        cache.keep(0)
    new = ids[:, cache.get_seq_length() :]
    arguments: dict[str, Any] = {cache_name(forward): cache}
    if takes(forward, "logits_to_keep"):
        arguments["logits_to_keep"] = last
    padded = mask is not None and not bool(mask.all())
    if padded and takes(forward, "position_ids"):
        assert mask is not None
        arguments["position_ids"] = position_ids(mask)[:, -new.shape[1] :]
    mask = torch.ones_like(ids) if mask is None else mask
    output = model(input_ids=new, attention_mask=mask, use_cache=True, return_dict=True, **arguments)
    logits: Tensor = output.logits[:, -last:]
    return logits.float()


@torch.no_grad()
def decode(
    model: Any,
    cache: ChainCache,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    rules: Rules,
    on_token: Callable[[int], None],
    drafter: TextDrafter | None = None,
) -> Tensor:
    """Continue one text token by token.

    Args:
        cache: of `model`'s chain; what it holds already must be the beginning of `prompt`, and less than all of it.
        prompt: (1, tokens) int64.
        rules: how a token is chosen, and when the text ends.
        on_token: called with each token before the next one is computed.
        drafter: guesses tokens that one step checks together; the answer is the same with any.
    Returns: (1, tokens) int64: prompt and answer.
    Raises: whatever `on_token` or the chain raises.
    """
    end = prompt.shape[1]
    text = torch.empty(1, end + max_new_tokens, dtype=torch.int64, device=prompt.device)
    text[:, :end] = prompt
    if drafter is None or _length_changes_angles(model.config):
        drafter = TextDrafter.without_drafts()
    ended = False
    while end < text.shape[1] and not ended:
        draft = drafter.propose(text[0, :end].tolist(), text.shape[1] - end - 1)
        began = drafter.clock()
        text[0, end : end + len(draft)] = torch.tensor(draft, dtype=torch.int64)
        logits = next_logits(model, cache, text[:, : end + len(draft)], last=len(draft) + 1).to(prompt.device)
        took, right = drafter.clock() - began, 0
        for place, guess in enumerate([*draft, None]):
            ended = rules.take(text, end, logits[:, place], on_token)
            end += 1
            if ended or int(text[0, end - 1]) != guess:
                break
            right += 1
        drafter.note(len(draft), right, took)
        if cache.get_seq_length() >= end:  # the rest of a draft that was wrong
            cache.keep(end - 1)
    return text[:, :end]
