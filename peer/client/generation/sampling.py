"""Logits processors and stopping criteria of ours: penalties and biases as OpenAI defines them, grammars,
probabilities, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

from petals.peer.client.constraints import TokenMask


@dataclass(frozen=True, slots=True)
class Chance:
    """A token that could come next, and the model's own log-probability of it."""

    id: int
    text: str
    """As it reads alone; special tokens are spelled out, a part of a character reads as U+FFFD."""
    logprob: float


@dataclass(frozen=True, slots=True)
class Chances:
    """The token that was chosen, and the likeliest ones, likeliest first."""

    chosen: Chance
    top: tuple[Chance, ...]


class ChanceRecorder(LogitsProcessor):
    """Remembers the logits as the model gave them: before penalties, temperature, top_k and top_p, so that the numbers
    say what the model believes and not what the settings made of it."""

    def __init__(self, top: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self._top = top
        self._tokenizer = tokenizer
        self._logprobs = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._logprobs = torch.log_softmax(scores[0].float(), dim=-1)
        return scores

    def of(self, token: int) -> Chances:
        """What the step that chose `token` looked like."""
        values, ids = self._logprobs.topk(min(self._top, len(self._logprobs)))
        top = tuple(self._chance(int(each), float(value)) for each, value in zip(ids, values, strict=True))
        return Chances(self._chance(token, float(self._logprobs[token])), top)

    def _chance(self, token: int, logprob: float) -> Chance:
        return Chance(token, str(self._tokenizer.decode([token])), logprob)


class Penalties(LogitsProcessor):
    """OpenAI's: what has been generated is made less likely, once (presence) and again with each use (frequency).

    The prompt does not count. Negative penalties make repetition likelier.
    """

    def __init__(self, prompt_length: int, *, presence: float, frequency: float) -> None:
        self._prompt_length = prompt_length
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        generated = input_ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class LogitBias(LogitsProcessor):
    """OpenAI's: a number added to the logits of some tokens."""

    def __init__(self, biases: Sequence[tuple[int, float]]) -> None:
        self._tokens = torch.tensor([token for token, _ in biases])
        self._biases = torch.tensor([bias for _, bias in biases])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self._tokens.to(scores.device)] += self._biases.to(scores.device)
        return scores


class Grammar(LogitsProcessor):
    """Only what a grammar allows."""

    def __init__(self, mask: TokenMask) -> None:
        self._mask = mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._mask.apply(scores)


class Enough(StoppingCriteria):
    """Ends a generation after the token at which `reached` was set."""

    def __init__(self) -> None:
        self.reached = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return torch.full((input_ids.shape[0],), self.reached, dtype=torch.bool, device=input_ids.device)
