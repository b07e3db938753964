"""A second way to run blocks, for steps of few tokens: the library's arithmetic without the library's layers.

`transformers` builds masks, cache objects and a dozen Python calls per block and token, and multiplies by six small
matrices where three large ones do. For the families below a step of a few rows runs here instead: fused products
(small_matmul.py), keys and values written where they stay, one attention call per session. Trained prompts, adapters,
new tokens that are padding and everything else take the library's way; both work on the same caches, so a session
changes between them at any step.

Rows of different sessions share every product: that is continuous batching. Only attention, which reads each session's
own keys and values, is done session by session. The numbers differ from the library's by rounding; a span uses this
path only after a self-test against the library's (selftest.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from petals.models.blocks.cache import LayerCache
from petals.models.blocks.passes import PASS_ROWS, NewTokens, Part, in_parts, positions
from petals.models.kernels.small_matmul import DenseProduct, Product, Samples, calibrate, fuse
from petals.models.kernels.threads import ThreadChoices


class _Block(Protocol):
    """One block. `around` is what `_Family.around` made for these rows."""

    @property
    def products(self) -> Sequence[Product]: ...

    def __call__(self, x: Tensor, around: Any, parts: Sequence[Part], caches: Sequence[LayerCache]) -> Tensor: ...


class _Family(Protocol):
    max_length: int
    """Positions the path is right for."""
    blocks: list[_Block]

    def around(self, x: Tensor, parts: Sequence[Part]) -> Any:
        """What all blocks need to know about the positions of these rows."""
        ...


class Lean:
    """The lean way through the blocks of a span."""

    def __init__(self, family: _Family, blocks: range, *, measured: bool) -> None:
        self._family = family
        self._blocks = blocks
        dense = any(isinstance(product, DenseProduct) for block in family.blocks for product in block.products)
        # Not for dense ones: their ways were measured for torch's number of threads.
        self._threads = ThreadChoices() if measured and not dense else None

    def takes(self, batch: int, tokens: int, position: int) -> bool:
        """Whether a step of this shape can go this way."""
        return batch * tokens <= PASS_ROWS and position + tokens <= self._family.max_length

    def calibrate(self) -> None:
        """Choose the fastest products now; otherwise when they are first needed."""
        calibrate(self._family.blocks[0].products)

    def run(self, sessions: Sequence[NewTokens]) -> list[Tensor]:
        """One pass for the new tokens of several sessions, at most PASS_ROWS rows together, which may use different
        sub-ranges of the span. None has an adapter.

        Returns: the sessions' outputs, shapes as given. Should it raise, the caches hold unequal numbers of tokens.
        """
        rows = sum(session.hidden.shape[0] * session.hidden.shape[1] for session in sessions)
        with nullcontext() if self._threads is None else self._threads.running(rows):
            return in_parts(sessions, self._run_range)

    def _run_range(self, blocks: range, states: Sequence[Tensor], parts: Sequence[Part]) -> Sequence[Tensor]:
        """Blocks that all the sessions go through."""
        x = states[0] if len(states) == 1 else torch.cat(tuple(states))
        around = self._family.around(x, parts)
        for block in blocks:
            caches = [part.cache.layer(block) for part in parts]
            x = self._family.blocks[block - self._blocks.start](x, around, parts, caches)
            for part, cache in zip(parts, caches, strict=True):
                cache.length = part.end
        return [x.narrow(0, part.first, part.rows) for part in parts]


def lean_path(
    model: PreTrainedModel, path: str, layers: Sequence[nn.Module], blocks: range, *, measured: bool
) -> Lean | None:
    """The lean way through `layers`, the blocks of the base model `model` whose list is at `path`; None if there is
    none for this family, or for weights like these.

    Weights that share their input are stacked: the layers' own become views of the stack. `measured`: multiply the way
    that is fastest here, which may round otherwise in another process.
    """
    build = _FAMILIES.get(model.config.model_type)
    if build is None:
        return None
    family = build(model, model.get_submodule(path.rpartition(".")[0]), layers, defaultdict(list) if measured else None)
    return None if family is None else Lean(family, blocks, measured=measured)


def _remember(pair: Tensor, cache: LayerCache, part: Part) -> tuple[Tensor, Tensor]:
    """Write the keys and values of one session's new tokens, pair (2, rows, heads, head_dim), into its cache.

    Returns: keys and values of all its tokens, (batch, heads, end, head_dim); views.
    """
    store = cache.pair
    assert store is not None  # the families of this module keep both in the same shape
    if part.tokens == 1:
        store.select(3, part.position).copy_(pair)
    else:
        _, _, heads, size = pair.shape
        new = pair.reshape(2, part.batch, part.tokens, heads, size).transpose(2, 3)
        store.narrow(3, part.position, part.tokens).copy_(new)
    keys, values = store.narrow(3, 0, part.end).unbind(0)
    return keys, values


def _attend(queries: Tensor, keys: Tensor, values: Tensor, part: Part, scale: float, hidden: Tensor | None) -> Tensor:
    """Attention of one session's new tokens, queries (rows, heads, head_dim), to all its tokens up to themselves but
    those that `hidden`, made by `_hidden`, says.

    Returns: (rows, heads * head_dim).
    """
    heads, size = queries.shape[1:]
    key_heads = keys.shape[1]
    groups = heads // key_heads
    if part.tokens == 1:  # all heads of a group ask the same keys: they stand for the tokens of one question
        asked = queries.view(part.batch, key_heads, groups, size)
        mixed = F.scaled_dot_product_attention(asked, keys, values, attn_mask=hidden, scale=scale)
        return mixed.view(part.rows, -1)
    asked = queries.view(part.batch, part.tokens, key_heads, groups, size).permute(0, 2, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(
        asked.reshape(part.batch, key_heads, groups * part.tokens, size),
        keys,
        values,
        attn_mask=None if hidden is None else hidden.repeat(1, 1, groups, 1),
        scale=scale,
    )
    mixed = mixed.view(part.batch, key_heads, groups, part.tokens, size).permute(0, 3, 1, 2, 4)
    return mixed.reshape(part.rows, -1)


def _attend_biased(queries: Tensor, keys: Tensor, values: Tensor, part: Part, scale: float, bias: Tensor) -> Tensor:
    """`_attend` with a bias of the scores, (heads or batch * heads, tokens, end), as many key heads as heads, and
    BLOOM's roundings."""
    heads, size = queries.shape[1:]
    asked = queries.view(part.batch, part.tokens, heads, size).transpose(1, 2).reshape(-1, part.tokens, size)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    if len(bias) < len(asked):
        bias = bias.repeat(part.batch, 1, 1)
    scores = torch.baddbmm(bias, asked, keys.mT, alpha=scale)
    mixed = torch.bmm(F.softmax(scores, -1, dtype=torch.float32).to(queries.dtype), values)
    return mixed.view(part.batch, heads, part.tokens, size).transpose(1, 2).reshape(part.rows, -1)


def _hidden(part: Part, like: Tensor) -> Tensor | None:
    """(1 or batch, 1, tokens, end): 0 where a new token may look, -inf where it may not; None: everywhere."""
    hidden: Tensor | None = None
    if part.tokens > 1:
        later = torch.full((part.tokens, part.end), float("-inf"), dtype=like.dtype, device=like.device)
        hidden = later.triu_(part.position + 1)[None, None]
    if part.mask is not None:
        padding = torch.zeros(part.mask.shape, dtype=like.dtype, device=like.device)
        padding = padding.masked_fill_(part.mask == 0, float("-inf"))[:, None, None]
        hidden = padding if hidden is None else hidden + padding
    return hidden


class _LlamaLike:
    """RMS norm, rotary positions, grouped queries, gated MLP; biases and norms of queries and keys where a family has
    them: Llama, Mistral, Qwen2, Qwen3."""

    def __init__(self, model: PreTrainedModel, stack: Any, blocks: list[_Block]) -> None:
        self.blocks = blocks
        self._rotary = stack.rotary_emb
        window = getattr(model.config, "sliding_window", None)
        self.max_length: int = window or 1 << 62

    @classmethod
    def build(
        cls, model: PreTrainedModel, stack: Any, layers: Sequence[Any], samples: Samples | None
    ) -> _LlamaLike | None:
        blocks = [_LlamaBlock.build(layer, samples) for layer in layers]
        return cls(model, stack, [b for b in blocks if b]) if all(blocks) else None

    def around(self, x: Tensor, parts: Sequence[Part]) -> _Around:
        """What all blocks need to know about these rows."""
        cos, sin = self._rotary(x, positions(parts, x.device)[None])
        sin[..., : sin.shape[-1] // 2].neg_()
        return _Around(cos[0, :, None], sin[0, :, None], [_hidden(part, x) for part in parts])


class _Around(NamedTuple):
    """Rotary angles and masks of a pass."""

    cos: Tensor
    """(rows, 1, head_dim)."""
    sin: Tensor
    """(rows, 1, head_dim): minus its first half, and its second."""
    hidden: Sequence[Tensor | None]
    """For each session, as `_hidden` makes it."""


@dataclass(frozen=True, slots=True)
class _LlamaBlock:
    """References, not the layer's modules: finding an attribute of a module takes as long as adding two rows."""

    products: tuple[Product, ...]
    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    norms: tuple[Any, Any]
    """Before attention, and before the MLP."""
    head_norms: tuple[Any, Any] | None
    """Of queries and of keys, head by head, where a family has them."""
    act: Callable[[Tensor], Tensor]
    scaling: float
    heads: int
    key_heads: int
    head_dim: int

    @classmethod
    def build(cls, layer: Any, samples: Samples | None) -> _LlamaBlock | None:
        attention, mlp = layer.self_attn, layer.mlp
        groups = (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        )
        qkv, out, gate_up, down = (fuse(group, samples) for group in groups)
        if qkv is None or out is None or gate_up is None or down is None:
            return None
        size = attention.head_dim
        heads, key_heads = (linear.out_features // size for linear in groups[0][:2])
        return cls(
            products=(qkv, out, gate_up, down),
            qkv=qkv,
            out=out,
            gate_up=gate_up,
            down=down,
            norms=(_rms_norm(layer.input_layernorm), _rms_norm(layer.post_attention_layernorm)),
            head_norms=(_rms_norm(attention.q_norm), _rms_norm(attention.k_norm))
            if hasattr(attention, "q_norm")
            else None,
            act=mlp.act_fn.forward,
            scaling=attention.scaling,
            heads=heads,
            key_heads=key_heads,
            head_dim=size,
        )

    def __call__(self, x: Tensor, around: _Around, parts: Sequence[Part], caches: Sequence[LayerCache]) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).view(len(x), -1, self.head_dim)
        asked = qkv.narrow(1, 0, self.heads)
        if self.head_norms is not None:
            keys = qkv.narrow(1, self.heads, self.key_heads)
            asked.copy_(self.head_norms[0](asked))
            keys.copy_(self.head_norms[1](keys))
        _rotate(qkv.narrow(1, 0, self.heads + self.key_heads), around.cos, around.sin)
        pairs = qkv.narrow(1, self.heads, 2 * self.key_heads).view(len(x), 2, self.key_heads, -1).transpose(0, 1)
        mixed = []
        for part, cache, hidden in zip(parts, caches, around.hidden, strict=True):
            keys, values = _remember(pairs.narrow(1, part.first, part.rows), cache, part)
            queries = asked.narrow(0, part.first, part.rows)
            mixed.append(_attend(queries, keys, values, part, self.scaling, hidden))
        x = x + self.out(mixed[0] if len(mixed) == 1 else torch.cat(mixed))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(self.act(gate) * up)


def _rms_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """The norm's function, rounded where the library rounds: in half precision it shows."""
    weight = norm.weight
    if weight.dtype != torch.float32:
        return norm  # type: ignore[no-any-return]
    return partial(torch.rms_norm, normalized_shape=weight.shape, weight=weight, eps=norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn x (rows, heads, head_dim), in place, by its rows' angles: x cos + (second half, first half) sin."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    if x.dtype == torch.float32:
        x.mul_(cos).addcmul_(swapped, sin)
    else:  # rounded product by product
        x.copy_(x * cos + swapped * sin)


class _Bloom:
    """Layer norm, alibi positions, biases everywhere."""

    max_length = 1 << 62

    def __init__(self, model: Any, blocks: list[_Block]) -> None:
        self.blocks = blocks
        self._heads: int = model.config.n_head
        self._build_alibi = model.build_alibi_tensor
        self._alibi = torch.empty(self._heads, 1, 0)

    @classmethod
    def build(cls, model: PreTrainedModel, stack: Any, layers: Sequence[Any], samples: Samples | None) -> _Bloom | None:
        config: Any = model.config
        if config.slow_but_exact or config.apply_residual_connection_post_layernorm:
            return None
        blocks = [_BloomBlock.build(layer, samples) for layer in layers]
        return cls(model, [b for b in blocks if b]) if all(blocks) else None

    def around(self, x: Tensor, parts: Sequence[Part]) -> list[Tensor]:
        """What is added to the scores of each session's new tokens: (heads or batch * heads, tokens, end)."""
        longest = max(part.end for part in parts)
        alibi = self._alibi  # sessions in other threads may replace it meanwhile
        if alibi.shape[-1] < longest or alibi.dtype != x.dtype:
            ones = torch.ones(1, max(256, 2 * longest), device=x.device)
            alibi = self._alibi = self._build_alibi(ones, self._heads, x.dtype)
        biases = []
        for part in parts:
            bias = alibi[..., : part.end]
            if part.mask is not None:
                bias = self._build_alibi(part.mask, self._heads, x.dtype)
            hidden = _hidden(part, x)
            if hidden is not None:
                bias = (bias.view(-1, self._heads, *bias.shape[1:]) + hidden).flatten(0, 1)
            biases.append(bias)
        return biases


@dataclass(frozen=True, slots=True)
class _BloomBlock:
    layer: Any
    products: tuple[Product, ...]
    qkv: Product
    out: Product
    up: Product
    down: Product

    @classmethod
    def build(cls, layer: Any, samples: Samples | None) -> _BloomBlock | None:
        attention, mlp = layer.self_attention, layer.mlp
        linears = (attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h)
        qkv, out, up, down = (fuse([linear], samples) for linear in linears)
        if qkv is None or out is None or up is None or down is None:
            return None
        return cls(layer, (qkv, out, up, down), qkv, out, up, down)

    def __call__(self, x: Tensor, around: list[Tensor], parts: Sequence[Part], caches: Sequence[LayerCache]) -> Tensor:
        layer, attention = self.layer, self.layer.self_attention
        qkv = self.qkv(layer.input_layernorm(x)).view(len(x), attention.num_heads, 3, attention.head_dim)
        asked, pairs = qkv.select(2, 0), qkv.narrow(2, 1, 2).permute(2, 0, 1, 3)
        mixed = []
        for part, cache, bias in zip(parts, caches, around, strict=True):
            keys, values = _remember(pairs.narrow(1, part.first, part.rows), cache, part)
            queries = asked.narrow(0, part.first, part.rows)
            mixed.append(_attend_biased(queries, keys, values, part, attention.inv_norm_factor, bias))
        x = x + self.out(mixed[0] if len(mixed) == 1 else torch.cat(mixed))
        up = self.up(layer.post_attention_layernorm(x))
        exact = x.dtype != torch.float32  # as for norms: the library's formula, rounding by rounding
        return x + self.down(layer.mlp.gelu_impl(up) if exact else F.gelu(up, approximate="tanh"))


_FAMILIES = {
    "llama": _LlamaLike.build,
    "mistral": _LlamaLike.build,
    "qwen2": _LlamaLike.build,
    "qwen3": _LlamaLike.build,
    "bloom": _Bloom.build,
}
