"""Every place where this project leans on how `transformers` works inside, in one file.

Theory. Each release of the library renames or removes something. What we use of it is of three kinds: names that it
exports and documents (classes, `forward`, `generate`, `from_pretrained`, logits processors), which need no care; the
contract of its `Cache`, which it documents but changes; and a few facts about how its models are put together. The
second and third kind are listed below. Each says what we rely on, and a test (test_library_contract.py) fails when the
installed library no longer calls, or offers, one of them. Where a version differs, the difference is read off the
library itself (a parameter's name), never off its version number.

What a release changed so far:

- 5.8 passes a number of query tokens to `get_mask_sizes`; before it passed positions.
- 5.13 calls the abstract `get_max_cache_shape` of a cache layer `get_max_length`.
- 5.15 lets `crop` remove tokens, and `crop(0)` remove none; before, a number that is not negative was kept.
- 5.24 calls the argument and the output `past_key_values` of every model `cache`, and takes a cache without layers
  for one of linear attention.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import GenerationMixin
from transformers.cache_utils import Cache

OLD_CACHE_NAME, NEW_CACHE_NAME, STATES_NAME = "past_key_values", "cache", "cache_params"
CACHE_NAMES = (NEW_CACHE_NAME, OLD_CACHE_NAME, STATES_NAME)
"""What a caller may name the cache, whatever the installed version calls it; the last name is the state spaces'."""


@dataclass(frozen=True, slots=True)
class Reliance:
    """One thing that the library must go on doing."""

    name: str
    relies_on: str
    used_by: str


CONTRACT: tuple[Reliance, ...] = (
    Reliance("cache argument", "`forward` takes and returns a `Cache`, by one of two names", "generation"),
    Reliance("cache length", "`Cache.get_seq_length` tells the library which tokens are new", "generation"),
    Reliance("cache mask sizes", "masks are built from `Cache.get_mask_sizes`", "generation, served blocks"),
    Reliance("cache reorder", "beam search calls `Cache.reorder_cache`", "beam search"),
    Reliance("cache crop", "assisted decoding calls `Cache.crop` with what it drops", "assisted decoding"),
    Reliance("layer update", "attention calls `Cache.update(keys, values, layer_idx)`", "served blocks"),
    Reliance("stack", "the base model loops over a `ModuleList` of all blocks", "client, served blocks"),
    Reliance("state_dict loading", "`from_pretrained(None, config=, state_dict=)` builds and fills a model", "loading"),
    Reliance("custom_generate", "`generate(custom_generate=f)` hands prepared inputs to `f`", "speculative decoding"),
)


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


DEFAULT_CACHE_NAME = (
    NEW_CACHE_NAME if NEW_CACHE_NAME in _parameters(GenerationMixin.prepare_inputs_for_generation) else OLD_CACHE_NAME
)
"""What `generate` of the installed version calls the cache."""

CROP_KEEPS = "max_length" in _parameters(Cache.crop)
"""Whether `crop(n)` with n >= 0 keeps n tokens; otherwise 0 removes none."""


def takes(forward: Callable[..., Any], parameter: str) -> bool:
    """Whether a model's `forward` has a parameter of this name."""
    return parameter in _parameters(forward)


def cache_name(forward: Callable[..., Any]) -> str:
    """What a model's `forward` calls its cache; models that only pass `**kwargs` on are taken for the library's own."""
    return next((name for name in CACHE_NAMES if takes(forward, name)), DEFAULT_CACHE_NAME)


def pop_cache(arguments: dict[str, Any]) -> Any:
    """Take the cache out of a call's arguments, under either name; None if there is none."""
    found = [arguments.pop(name, None) for name in CACHE_NAMES]
    return next((cache for cache in found if cache is not None), None)
