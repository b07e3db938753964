"""What is asked of a generation: how tokens are chosen, and when there are enough."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from transformers import GenerationConfig

from petals.models.client.drafts import DraftMode
from petals.models.source.checkpoint import Checkpoint
from petals.models.source.context_length import longest_context
from petals.peer.client.constraints import Constraint
from petals.peer.client.generation.prompts import PromptTooLong
from petals.protocols.errors import UserError

MAX_STOP_CHARACTERS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """What `transformers.generate` is asked for. Without temperature, top_k, top_p or seed the likeliest token wins."""

    max_new_tokens: int = 64
    temperature: float | None = None
    top_k: int | None = None
    """0: among all tokens; None: what the model's `generation_config.json` says."""
    top_p: float | None = None
    seed: int | None = None
    max_length: int | None = None
    """Room of the session in tokens, prompt included; None: just what is needed."""
    fit: bool = False
    """Rather fewer than `max_new_tokens` than a refusal, where the model can not look back on all of it."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these; they may span tokens."""
    presence_penalty: float = 0.0
    """Taken once from the logit of every token that was generated before; from -2 to 2."""
    frequency_penalty: float = 0.0
    """The same for each time it was generated."""
    repetition_penalty: float = 1.0
    """What the logit of every token of prompt and answer is divided by (multiplied, where it is negative)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of tokens."""
    min_p: float | None = None
    """Sample among tokens with at least this share of the likeliest one's probability."""
    typical_p: float | None = None
    """Sample among the most typical tokens that have this probability together (locally typical sampling)."""
    min_new_tokens: int = 0
    """Nothing ends the answer before."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, beside the model's own."""
    ignore_eos: bool = False
    """The model's own ends do not end the answer."""
    json_schema: Mapping[str, Any] | bool | str | None = None
    """The text is JSON that this schema accepts; {}: any JSON. Of this and the next four at most one is given."""
    regex: str | None = None
    """The whole text matches this regular expression."""
    choice: tuple[str, ...] = ()
    """The text is one of these."""
    grammar: str | None = None
    """The text is of this grammar, in GBNF or Lark."""
    constraint: Constraint | None = None
    """What the text must match, made by a program (constraints.py)."""
    special_tokens: bool = False
    """Special tokens are spelled out in the text, but for the one that ends it."""
    drafts: DraftMode = "auto"
    """Guess tokens from the text and check several in one step: "auto" (where measured steps say that it pays),
    "always" or "never". The answer is the same with each."""
    logprobs: int | None = None
    """How many of the likeliest tokens to tell with each token; 0: only the one chosen; None: nothing."""

    def __post_init__(self) -> None:
        if self.drafts not in get_args(DraftMode):
            raise UserError(f"drafts must be one of {', '.join(get_args(DraftMode))}")
        if self.max_new_tokens < 1:
            raise UserError("max_new_tokens must be at least 1")
        if self.temperature is not None and not self.temperature > 0:
            raise UserError("temperature must be above 0; leave it out to take the likeliest token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError("top_p must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 0:
            raise UserError("top_k must be at least 1, or 0 for all tokens")
        if not all(self.stop) or sum(map(len, self.stop)) > MAX_STOP_CHARACTERS:
            raise UserError(
                f"stop strings must not be empty, nor longer than {MAX_STOP_CHARACTERS} characters together"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UserError(f"{name} must be from -2 to 2")
        if not self.repetition_penalty > 0:
            raise UserError("repetition_penalty must be above 0")
        for name in ("min_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} must be above 0 and at most 1")
        if self.min_new_tokens < 0:
            raise UserError("min_new_tokens must not be negative")
        if self.matching is not None and self.ignore_eos:
            raise UserError("ignore_eos does not go with a grammar, which says where the answer ends")
        if self.logprobs is not None and self.logprobs < 0:
            raise UserError("logprobs must not be negative")

    @property
    def matching(self) -> Constraint | None:
        """What the text must match.

        Raises:
            UserError: there are two, or one is none.
        """
        given = [] if self.constraint is None else [self.constraint]
        if self.json_schema is not None:
            given.append(Constraint.json_schema(self.json_schema))
        if self.regex is not None:
            given.append(Constraint.regex(self.regex))
        if self.choice:
            given.append(Constraint.choice(self.choice))
        if self.grammar is not None:
            given.append(Constraint.grammar(self.grammar))
        if len(given) > 1:
            raise UserError("give one of json_schema, regex, choice and grammar")
        return given[0] if given else None

    @property
    def samples(self) -> bool:
        chosen = (self.temperature, self.top_k, self.top_p, self.min_p, self.typical_p, self.seed)
        return any(each is not None for each in chosen)

    def applied_to(self, config: GenerationConfig) -> GenerationConfig:
        """A model's own settings with what was asked for on top."""
        config = copy.deepcopy(config)
        config.do_sample = self.samples
        for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"):
            if getattr(self, name) is not None:
                setattr(config, name, getattr(self, name))
        if self.repetition_penalty != 1:
            config.repetition_penalty = self.repetition_penalty
        if self.min_new_tokens:
            config.min_new_tokens = self.min_new_tokens
        return config

    def for_vocabulary(self, checkpoint: Checkpoint) -> None:
        """
        Raises:
            UserError: it names tokens that the model does not have.
        """
        vocabulary = checkpoint.config.get_text_config().vocab_size
        for name, tokens in (("logit_bias", dict(self.logit_bias)), ("stop_token_ids", self.stop_token_ids)):
            if any(not 0 <= token < vocabulary for token in tokens):
                raise UserError(f"{checkpoint.name} has tokens 0 to {vocabulary - 1}; {name} names others")


def room_for(length: int, options: GenerationOptions, checkpoint: Checkpoint) -> int:
    """How many tokens to generate after a prompt of `length`."""
    limit = longest_context(checkpoint.config)
    allowed = min((each for each in (options.max_length, limit) if each is not None), default=None)
    if allowed is None or length + options.max_new_tokens <= allowed:
        return options.max_new_tokens
    if options.fit and length < allowed:
        return int(allowed) - length
    if options.max_length == allowed:
        raise PromptTooLong(
            f"a prompt of {length} tokens and {options.max_new_tokens} new ones do not fit into {options.max_length}"
        )
    raise PromptTooLong(
        f"a prompt of {length} tokens and {options.max_new_tokens} new ones are more than the {limit} "
        f"that {checkpoint.name} can look back on; shorten the prompt or lower max_new_tokens"
    )
