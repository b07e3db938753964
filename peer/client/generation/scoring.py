"""What a model thinks of a text that is there already: log-probabilities of its tokens, or one vector of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import trio
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from petals.models.client.decoding import next_logits
from petals.models.client.generation import ChainCache
from petals.models.library_contract import cache_name
from petals.models.source.context_length import longest_context
from petals.peer.base.concurrency import shielded_for
from petals.peer.client.generation.prompts import Prompt, PromptTooLong, tokenise
from petals.peer.client.generation.sampling import Chance, Chances
from petals.peer.client.model_client import ClientOptions, ModelClient
from petals.peer.client.remote_chain import RemoteChainSession

T = TypeVar("T")

Pooling = Literal["mean", "last"]

PIECE_TOKENS = 256
"""Sent and scored at once: the logits of a whole prompt would be gigabytes."""
CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Scores:
    """A prompt's tokens and what the model thought of each, given those before it."""

    ids: list[int]
    tokens: list[tuple[str, Chances | None]]
    """The token's text; None for the first, which nothing comes before."""


async def score(client: ModelClient, prompt: Prompt, options: ClientOptions, *, top: int) -> Scores:
    """Log-probabilities of a prompt's tokens.

    Args:
        top: how many of the likeliest tokens to tell at each place.
    Raises:
        UserError: a prompt that is not for this model. MissingBlocks, SwarmError.
    """
    model, tokenizer = await client.language_model(options.head_quant)
    ids = await _tokenised(client, tokenizer, prompt)

    def scored(cache: ChainCache) -> list[tuple[str, Chances | None]]:
        text = torch.tensor([ids])
        found: list[tuple[str, Chances | None]] = [(str(tokenizer.decode(ids[:1])), None)]
        for begin, end in _pieces(len(ids)):
            logprobs = next_logits(model, cache, text[:, :end], last=end - begin)[0].log_softmax(-1)
            for at, row in zip(range(begin + 1, min(end + 1, len(ids))), logprobs, strict=False):
                chances = _chances(tokenizer, row, ids[at], top)
                found.append((chances.chosen.text, chances))
        return found

    return Scores(ids, await _with_cache(client, options, len(ids), scored))


async def embed(
    client: ModelClient, prompt: Prompt, options: ClientOptions, *, pooling: Pooling = "mean"
) -> tuple[list[int], Tensor]:
    """A prompt's tokens, and one vector of it: its last hidden states behind the model's final norm, their mean or the
    last of them, (hidden_size,) float32 of length 1.

    Raises: as `score`.
    """
    model, tokenizer = await client.language_model(options.head_quant)
    ids = await _tokenised(client, tokenizer, prompt)

    def embedded(cache: ChainCache) -> Tensor:
        text = torch.tensor([ids])
        total = torch.zeros(0)
        for begin, end in _pieces(len(ids)):
            hidden = _hidden(model, cache, text[:, begin:end])[0].float()
            piece = hidden.sum(0) if pooling == "mean" else hidden[-1]
            total = total + piece if pooling == "mean" and len(total) else piece
        return torch.nn.functional.normalize(total, dim=0)

    return ids, await _with_cache(client, options, len(ids), embedded)


@torch.no_grad()
def _hidden(model: Any, cache: ChainCache, new: Tensor) -> Tensor:
    mask = torch.ones(1, cache.get_seq_length() + new.shape[1], dtype=torch.int64)
    name = cache_name(type(model.base_model).forward)
    output = model.base_model(input_ids=new, attention_mask=mask, use_cache=True, return_dict=True, **{name: cache})
    hidden: Tensor = output.last_hidden_state
    return hidden


async def _tokenised(client: ModelClient, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    ids = await trio.to_thread.run_sync(
        partial(tokenise, tokenizer, prompt, client.checkpoint),
        abandon_on_cancel=True,  # type: ignore[call-arg]  # trio_typing knows its old name
    )
    limit = longest_context(client.checkpoint.config)
    if limit is not None and len(ids) > limit:
        raise PromptTooLong(
            f"a prompt of {len(ids)} tokens is more than the {limit} that {client.checkpoint.name} can look back on"
        )
    return ids


async def _with_cache(client: ModelClient, options: ClientOptions, tokens: int, work: Callable[[ChainCache], T]) -> T:
    """`work` in a thread, with a session of its own; however it ends, the servers' caches are free again."""
    cache = ChainCache(client.chain(options), tokens)
    whole = False
    try:
        result: T = await client.portal.run_sync(work, cache)
        whole = True
        return result
    finally:
        session = cache.session
        if isinstance(session, RemoteChainSession):
            with shielded_for(CLOSE_S):
                await (client.leave(session.remote, []) if whole else session.remote.reset())


def _pieces(tokens: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, tokens, PIECE_TOKENS):
        yield begin, min(begin + PIECE_TOKENS, tokens)


def _chances(tokenizer: PreTrainedTokenizerBase, logprobs: Tensor, token: int, top: int) -> Chances:
    values, ids = logprobs.topk(top)

    def chance(number: int, value: float) -> Chance:
        return Chance(number, str(tokenizer.decode([number])), value)

    likeliest = tuple(chance(int(each), float(value)) for each, value in zip(ids, values, strict=True))
    return Chances(chance(token, float(logprobs[token])), likeliest)
