"""Tensors that are not read yet: `transformers` renames, joins and stacks them, and nothing is in memory.

A checkpoint's tensors have other names than the model's, and the experts of a block, a matrix each in the file, are one
stacked tensor in the model. `transformers` knows all of that. So its `from_pretrained` is given stand-ins: tensors with
a shape and a dtype, but without numbers, that write down what is done to them (a recipe). Afterwards every weight of
the model has its recipe, and is made matrix by matrix: of a stack of experts, one at a time.

What is understood - stacks, rows joined, the last two dimensions swapped - leaves a packed matrix packed. Any other
operation works, too: on the dequantised numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from petals.models.kernels.packed import Joined, Packed

aten: Any = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A tensor of a checkpoint.

    Attributes:
        packed: makes the matrix, or that expert's of a stack; None: it is not quantised.
        plain: reads the tensor as it is, or that expert's; for what is not quantised.
        flipped: the model has the last two dimensions the other way round.
        parts: names of the tensors that make up a quantised one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    packed: Callable[[int | None], Packed] | None
    plain: Callable[[int | None], Tensor]
    flipped: bool = False
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A source; `expert`: only this matrix of its stack."""

    source: Source
    expert: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Done:
    """An operation on recipes."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int | None = None
    """Which of several."""


Recipe = Leaf | Done


class StandIn(Tensor):
    """A tensor without numbers. Has the attribute `recipe`."""

    recipe: Recipe

    @staticmethod
    def __new__(cls, recipe: Recipe, like: Tensor) -> StandIn:
        """`like`: has shape and dtype, on any device."""
        made: StandIn = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=torch.device("cpu"))
        made.recipe = recipe
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}

        def as_meta(value: Any) -> Any:
            return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value

        def as_recipe(value: Any) -> Any:
            return value.recipe if isinstance(value, StandIn) else value

        outcome = func(*tree_map(as_meta, args), **tree_map(as_meta, {**kwargs, **_on_meta(kwargs)}))
        recorded, named = tree_map(as_recipe, args), tree_map(as_recipe, kwargs)
        if isinstance(outcome, Tensor):
            return StandIn(Done(func, recorded, named), outcome)
        if isinstance(outcome, (list, tuple)):
            return [StandIn(Done(func, recorded, named, i), each) for i, each in enumerate(outcome)]
        return outcome

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StandIn({tuple(self.shape)}, {self.dtype})"


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"device": torch.device("meta")} if kwargs.get("device") is not None else {}


def stand_in(source: Source) -> StandIn:
    """For a tensor of a checkpoint, in the shape that the model has it in."""
    made = StandIn(Leaf(source), torch.empty(source.shape, dtype=source.dtype, device="meta"))
    return made.transpose(1, 2) if source.flipped else made  # type: ignore[return-value]


def evaluate(recipe: Recipe) -> Tensor:
    """The numbers: everything that it takes is read, and dequantised to float32."""
    if isinstance(recipe, Leaf):
        return _read(recipe.source, recipe.expert)

    def made(value: Any) -> Any:
        return evaluate(value) if isinstance(value, (Leaf, Done)) else value

    outcome = recipe.func(*_map(made, recipe.args), **_map(made, recipe.kwargs))
    return outcome if recipe.output is None else outcome[recipe.output]  # type: ignore[no-any-return]


def _read(source: Source, expert: int | None) -> Tensor:
    """The numbers of a tensor, or of one expert of a stack, as stored; float32 where it is quantised."""
    if source.packed is None:
        return source.plain(expert)
    if len(source.shape) == 2 or expert is not None:
        return source.packed(expert).dequantised()
    stacked = torch.empty(source.shape)
    for index, matrix in enumerate(stacked):
        matrix.copy_(source.packed(index).dequantised())
    return stacked


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Recipes are dataclasses, which no library may look into."""
    if isinstance(value, (list, tuple)):
        return type(value)(_map(change, each) for each in value)
    if isinstance(value, dict):
        return {key: _map(change, each) for key, each in value.items()}
    return change(value)


_SAME = (aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default, aten.lift_fresh.default)


def _inner(recipe: Recipe) -> Recipe:
    """Without operations around it that change no number, or only its dtype."""
    while isinstance(recipe, Done) and _changes_nothing(recipe):
        recipe = recipe.args[0]
    return recipe


def _changes_nothing(done: Done) -> bool:
    if done.func in _SAME:
        return True
    if done.func is aten.slice.Tensor:  # all of a dimension
        given: list[Any] = [*done.args, None, None, None]
        first, last, step = given[2:5]
        return not first and (last is None or last >= (1 << 62)) and step in (None, 1)
    return False


def packed_matrix(recipe: Recipe) -> Packed | None:
    """The matrix of a two-dimensional recipe in the checkpoint's own bits; None: it is not quantised, or not only rows
    were joined or cut."""
    recipe = _inner(recipe)
    if isinstance(recipe, Leaf):
        return None if recipe.source.packed is None else recipe.source.packed(recipe.expert)
    if recipe.func is aten.cat.default and _dimension(recipe, 1) in (0, -2):
        parts = [packed_matrix(part) for part in recipe.args[0]]
        known = [part for part in parts if part is not None]
        return Joined(known) if len(known) == len(parts) else None
    if recipe.output is not None and recipe.func in (aten.split.Tensor, aten.split_with_sizes.default):
        whole = packed_matrix(recipe.args[0]) if _dimension(recipe, 2) in (0, -2) else None
        if whole is None:
            return None
        sizes = recipe.args[1]
        if isinstance(sizes, int):
            first = sizes * recipe.output
            return whole.narrow(first, min(first + sizes, whole.shape[0]))
        first = sum(sizes[: recipe.output])
        return whole.narrow(first, first + sizes[recipe.output])
    return None


def _dimension(done: Done, at: int) -> int:
    """An operation's argument `dim`, which is the first by default."""
    return int(done.kwargs.get("dim", done.args[at] if len(done.args) > at else 0))


def matrices(recipe: Recipe) -> tuple[Sequence[Recipe], bool] | None:
    """Those of a three-dimensional recipe, one for each expert; and whether its last two dimensions are swapped against
    theirs. None: it is no stack of matrices."""
    recipe = _inner(recipe)
    if isinstance(recipe, Leaf):
        if len(recipe.source.shape) != 3:
            return None
        return [Leaf(recipe.source, expert) for expert in range(recipe.source.shape[0])], False
    if recipe.func is aten.stack.default and _dimension(recipe, 1) == 0:
        return list(recipe.args[0]), False
    if recipe.func is aten.transpose.int and {int(dim) % 3 for dim in recipe.args[1:3]} == {1, 2}:
        inner = matrices(recipe.args[0])
        return None if inner is None else (inner[0], not inner[1])
    if recipe.func is aten.cat.default:
        return _joined(recipe)
    return None


def _joined(recipe: Done) -> tuple[Sequence[Recipe], bool] | None:
    """Stacks whose matrices' rows are joined, expert by expert."""
    stacks = [matrices(part) for part in recipe.args[0]]
    known = [stack for stack in stacks if stack is not None]
    if len(known) < len(stacks) or len({flipped for _, flipped in known}) != 1:
        return None
    flipped = known[0][1]
    dim = _dimension(recipe, 1) % 3
    if dim == 0:
        return [each for stack, _ in known for each in stack], flipped
    if dim != (2 if flipped else 1):
        return None
    return [
        Done(aten.cat.default, (list(parts), 0), {}) for parts in zip(*(stack for stack, _ in known), strict=True)
    ], flipped
