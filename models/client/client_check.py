"""Before a client trusts the installed `transformers`, it compares itself with it, once per versions and family.

Theory. A new release of the library may change what it passes to a cache or how it slices its inputs; the client would
then send other tokens than it means, and every answer would be wrong without an error. So a miniature of the model's
family runs whole, by the installed library alone, and again as our client over our own chain. Greedy tokens, a padded
batch and a roll-back must come out the same. That takes some tenths of a second; the verdict is kept in the user's
cache, so that it is paid once after an installation.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

from petals.models.blocks.block import BlockSpan
from petals.models.client.chain import BlockChain
from petals.models.client.decoding import Rules, decode
from petals.models.client.generation import ChainCache
from petals.models.client.local import LocalChain
from petals.models.client.miniature import lively_weights, miniature
from petals.models.errors import ModelError, UnsupportedLibrary
from petals.models.families import base_of
from petals.models.source.disk import cache_directory, write_json
from petals.models.source.loading import cut, find_layers, quiet_library

log = logging.getLogger(__name__)

NEW_TOKENS = 6
_STRANGE = (ModelError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)

Build = Callable[[PretrainedConfig, dict[str, Tensor], BlockChain], Any]
"""Makes our client model of a configuration and all its weights over a chain."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """The miniature run by the library alone, and ours."""

    whole: Any
    client: Any
    chain: BlockChain


_checked: set[str] = set()
"""What this process has found right."""


def check_client(config: PretrainedConfig, head_class: type[Any], build: Build) -> None:
    """Compare the client with the installed `transformers` on a miniature of `config`'s family, unless that was done.

    Args:
        head_class: the library's own class of the family.
    Raises: UnsupportedLibrary when they differ: naming the versions, what differs and what to install.
    """
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    mark = "-".join([config.get_text_config(decoder=True).model_type, *versions.values(), _petals_version()])
    kept = cache_directory() / "checked" / f"{mark}.json"
    if mark in _checked or kept.is_file():
        return
    pair = _make_pair(config, head_class, build)
    for name, check in (("greedy", _greedy), ("padded batch", _padded), ("roll-back", _roll_back)):
        with torch.no_grad():
            same = _holds(check, pair)
        if not same:
            raise UnsupportedLibrary(versions["transformers"], name)
    _checked.add(mark)
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"checked": ["greedy", "padded batch", "roll-back"], **versions})


def _petals_version() -> str:
    try:
        return importlib.metadata.version("petals-libp2p")
    except importlib.metadata.PackageNotFoundError:  # a clone that is not installed
        return "clone"


def _holds(check: Callable[[_Pair], bool], pair: _Pair) -> bool:
    try:
        return check(pair)
    except _STRANGE as error:
        log.warning("the self-check failed with %s: %s", type(error).__name__, error)
        return False


def _make_pair(config: PretrainedConfig, head_class: type[Any], build: Build) -> _Pair:
    """A miniature of the family; of Llama, where the family has none that the library itself can run alone."""
    try:
        return _pair_of(miniature(config), head_class, build)
    except _STRANGE as error:
        log.info("no miniature of %s (%s): the client is checked with Llama's", config.model_type, error)
        from transformers import LlamaForCausalLM

        return _pair_of(miniature(LlamaConfig(num_key_value_heads=2)), LlamaForCausalLM, build)


def _pair_of(config: PretrainedConfig, head_class: type[Any], build: Build) -> _Pair:
    with quiet_library():
        with torch.device("meta"):
            skeleton = head_class(copy.deepcopy(config))
        state = lively_weights(skeleton)
        whole = head_class.from_pretrained(None, config=copy.deepcopy(config), state_dict=dict(state)).float().eval()
    base = copy.deepcopy(base_of(whole))
    path = find_layers(type(base), config)
    blocks = range(config.num_hidden_layers)
    cut(base, path, blocks)
    span = BlockSpan(base, path, blocks, quant_type="none", dtype=torch.float32)
    span.measure_shapes()
    _said(copy.deepcopy(whole), _prompts(1))  # what the library cannot run itself proves nothing
    chain = LocalChain(span)
    return _Pair(whole, build(config, state, chain), chain)


def _prompts(rows: int) -> Tensor:
    return torch.randint(2, 100, (rows, 7), generator=torch.Generator().manual_seed(5))


def _said(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """A greedy answer by the library's `generate`."""
    mask = torch.ones_like(ids) if mask is None else mask
    tokens: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokens


def _expected(pair: _Pair, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """By a copy of the whole model: some rotary embeddings remember how long the last text was."""
    return _said(copy.deepcopy(pair.whole), ids, mask)


def _ours(pair: _Pair, cache: ChainCache, ids: Tensor, count: int = NEW_TOKENS) -> Tensor:
    return decode(pair.client, cache, ids, max_new_tokens=count, rules=Rules(), on_token=lambda token: None)


def _greedy(pair: _Pair) -> bool:
    ids = _prompts(1)
    expected = _expected(pair, ids)
    with ChainCache(pair.chain, 2 * ids.shape[1] + NEW_TOKENS).closing() as cache:
        ours = _ours(pair, cache, ids)
    return torch.equal(ours, expected) and torch.equal(_said(pair.client, ids), expected)


def _padded(pair: _Pair) -> bool:
    ids = _prompts(2)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return torch.equal(_said(pair.client, ids, mask), _expected(pair, ids, mask))


def _roll_back(pair: _Pair) -> bool:
    """What was said and taken back leaves no trace."""
    ids = _prompts(1)
    with ChainCache(pair.chain, 2 * ids.shape[1] + NEW_TOKENS).closing() as cache:
        _ours(pair, cache, torch.cat([ids, ids.flip(1)], dim=1), 2)
        cache.keep(ids.shape[1] - 2)
        return torch.equal(_ours(pair, cache, ids), _expected(pair, ids))
