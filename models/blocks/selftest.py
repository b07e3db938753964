"""A loaded span proves itself before it serves: wrong numbers are worse than none.

The generic contract (loading.py) assumes four things of a family that nobody has read: its stack hands the hidden
state to the first block as it is; what else a block is given does not depend on what the tokens are; a block's memory
of earlier tokens is keys and values; and padding is hidden by the attention mask. Each is looked at here, on the
model's own layer modules and their own weights, with a few random tokens. For families that the tests prove exact one
block is enough - it notices a new version of `transformers` that does something else - others are checked block by
block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from petals.models.blocks.assemble import Proof
from petals.models.blocks.block import BlockSpan
from petals.models.blocks.cache import SpanCache
from petals.models.errors import StepError, UnsupportedModel

_TOKENS = 6
"""Tokens per row; short, since rotary embeddings that depend on the length change with it."""
_PADS = 2
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference, relative to the largest value: rounding differs between one token and several at once."""
_PIECE_ROWS = 1024
"""Of a matrix that are widened at a time."""
_WEIGHTS_TOLERANCE = {
    (quant_type, dtype): max(rounding, half)
    for quant_type, rounding in (("none", 0.0), ("int8", 0.05), ("nf4", 0.5))
    for dtype, half in ((torch.float32, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 3e-2))
}
"""Largest error of a matrix's products, as a quotient of norms; unrelated ones differ by 1.4."""
_SURE = {torch.float32: 1.0}
"""Which part of the tokens must agree. In half precision an expert chosen by a hair may be another one."""
_SURE_OTHERWISE = 0.75


def check_weights(span: BlockSpan, proofs: Sequence[Proof], *, title: str) -> None:
    """Compare products of the first block's matrices with those of the numbers in the checkpoint, read again and
    dequantised by the reference: names in the wrong place, kernels that are wrong on this machine, damaged memory.

    Raises: UnsupportedModel, saying which matrix differs.
    """
    generator = torch.Generator().manual_seed(2)
    for proof in proofs:
        with torch.inference_mode():
            numbers = proof.numbers()
            rows = torch.randn(2, numbers.shape[1], generator=generator).to(span.dtype)
            theirs = torch.cat([rows.float() @ piece.float().t() for piece in torch.split(numbers, _PIECE_ROWS)], 1)
            ours = proof.product(rows.to(span.device)).float().cpu()
        right = ours.shape == theirs.shape and bool(
            ((ours - theirs).norm() <= _WEIGHTS_TOLERANCE[span.quant_type, span.dtype] * theirs.norm()).all()
        )
        _expect(right, title, f"block {span.blocks.start} multiplies by another {proof.path} than the checkpoint has")


def check_span(span: BlockSpan, *, title: str, thorough: bool) -> None:
    """Compare the span with the layers it is made of.

    Args:
        title: what the message calls the model.
        thorough: check every block and how they follow one another, not only the first.
    Raises: UnsupportedModel, saying which assumption does not hold.
    """
    try:
        with torch.inference_mode():
            _check(span, title, thorough)
    except StepError as error:
        raise _refusal(title, f"a block leans on other blocks ({error})") from error


def _check(span: BlockSpan, title: str, thorough: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, _TOKENS, span.hidden_size)
    hidden = torch.randn(shape, generator=generator).to(device=span.device, dtype=span.dtype)
    other = torch.randn(shape, generator=generator).to(device=span.device, dtype=span.dtype)
    blocks = span.blocks if thorough else range(span.blocks.start, span.blocks.start + 1)
    for block in blocks:
        _check_block(span, block, hidden, other, title)
    if thorough:
        _check_chain(span, hidden, title)


def _check_block(span: BlockSpan, block: int, hidden: Tensor, other: Tensor, title: str) -> None:
    """One block: its own layer's answer, then ours with a cache, then ours with padding."""
    one = range(block, block + 1)
    (layer,) = span.layers(one)
    with _listening(layer) as calls:
        ours = span.forward(hidden, one)
        span.forward(other, one)
    _expect(len(calls) == 2, title, f"block {block} does not run exactly once")
    (given, extras, theirs), (_, other_extras, _) = calls
    _expect(bool(torch.isfinite(ours).all()), title, f"block {block} gives numbers that are not finite in {span.dtype}")
    _expect(torch.equal(given, hidden), title, "something changes the hidden state before the first block")
    _expect(torch.equal(theirs, ours), title, "something changes the hidden state after the last block")
    _expect(_same(extras, other_extras), title, "blocks are given more than a hidden state and positions")

    cache = span.new_cache(one, 2, _TOKENS)
    cuts = ((0, _TOKENS - 4), (_TOKENS - 4, _TOKENS - 2), (_TOKENS - 2, _TOKENS - 1), (_TOKENS - 1, _TOKENS))
    steps = torch.cat([span.step(hidden[:, begin:end], cache) for begin, end in cuts], 1)
    _expect(_close(span, steps, ours), title, f"block {block} with a cache differs from itself without")

    padded = torch.cat([other[:, :_PADS], hidden], 1)
    mask = torch.ones(2, _PADS + _TOKENS, dtype=torch.int64)
    mask[:, :_PADS] = 0
    behind = span.forward(padded, one, attention_mask=mask)[:, _PADS:]
    _expect(_close(span, behind, ours), title, f"block {block} looks at padding")


def agrees(span: BlockSpan, *, joint: bool = False) -> bool:
    """Whether the lean way (lean.py), or `joint` a pass that sessions share (joint.py), gives what the library's way
    gives each session alone: two of different lengths through all blocks, token by token, several at once, both
    together, and both with padding."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, _TOKENS, span.hidden_size, generator=generator).to(device=span.device, dtype=span.dtype)
    with torch.inference_mode():
        with span.library_path(shared=True) if joint else nullcontext():
            ours = _steps(span, hidden)
        with span.library_path():
            theirs = _steps(span, hidden)
    return _close(span, ours, theirs)


def _steps(span: BlockSpan, hidden: Tensor) -> Tensor:
    """Two rows in one session and one in another, (3, tokens, hidden_size), together where the span can; in the last
    step a token of two of the rows is hidden as if it had been padding."""
    two, one = (span.new_cache(span.blocks, batch, _TOKENS) for batch in (2, 1))
    outputs = [[span.step(hidden[:2, :1], two)], [span.step(hidden[2:, :3], one)]]
    outputs[0].append(span.step(hidden[:2, 1:4], two))
    padded = torch.ones(3, _TOKENS, dtype=torch.int64)
    padded[1:, 0] = 0
    pairs: list[list[tuple[Tensor, SpanCache, Tensor | None]]] = [
        [(hidden[:2, 4:5], two, None), (hidden[2:, 3:5], one, None)],
        [(hidden[:2, 5:], two, padded[:2]), (hidden[2:, 5:], one, padded[2:])],
    ]
    for pair in pairs:
        rows, caches, masks = zip(*pair, strict=True)
        if all(span.can_join(*step) for step in pair):
            new = span.step_together(rows, caches, masks)
        else:
            new = [span.step(hidden, cache, attention_mask=mask) for hidden, cache, mask in pair]
        for output, part in zip(outputs, new, strict=True):
            output.append(part)
    return torch.cat([torch.cat(output, 1) for output in outputs])


def _check_chain(span: BlockSpan, hidden: Tensor, title: str) -> None:
    """All blocks in one go, and one after another: every block's input is the last one's output."""
    alone = hidden
    for block in span.blocks:
        alone = span.forward(alone, range(block, block + 1))
    _expect(
        _close(span, span.forward(hidden, span.blocks), alone), title, "blocks in a row differ from blocks one by one"
    )
    cache = span.new_cache(span.blocks, 2, _TOKENS)
    steps = torch.cat([span.step(hidden[:, :-1], cache), span.step(hidden[:, -1:], cache)], 1)
    _expect(_close(span, steps, alone), title, "blocks in a row with a cache differ from blocks one by one")


@contextmanager
def _listening(layer: nn.Module) -> Iterator[list[tuple[Tensor, dict[str, Any], Tensor]]]:
    """Collects (input, other arguments, output) of every call of a layer."""
    calls: list[tuple[Tensor, dict[str, Any], Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        rest = {f"argument {i}": value for i, value in enumerate(args) if i} | {
            key: value for key, value in kwargs.items() if key != "hidden_states"
        }
        calls.append((given, rest, output[0] if isinstance(output, tuple) else output))  # type: ignore[arg-type]

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _same(one: object, two: object) -> bool:
    """Whether arguments of two calls are equal, tensor by tensor."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)):
        return len(one) == len(two) and all(map(_same, one, two))
    return type(one) is type(two)


def _close(span: BlockSpan, ours: Tensor, theirs: Tensor) -> bool:
    """Whether enough tokens, (batch, tokens, hidden_size), agree to rounding."""
    # quantised products round their rows to half precision, whatever the rows are
    precision = span.dtype if span.quant_type == "none" else torch.bfloat16
    limit = _TOLERANCE.get(precision, 1e-3) * float(theirs.abs().max())
    worst = (ours.float() - theirs.float()).abs().amax(-1)
    return float((worst <= limit).float().mean()) >= _SURE.get(precision, _SURE_OTHERWISE)


def _expect(holds: bool, title: str, otherwise: str) -> None:
    if not holds:
        raise _refusal(title, otherwise)


def _refusal(title: str, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"{title} cannot be served exactly: {reason}; see docs/custom-model.md")
