"""Give every weight of a model that was built of stand-ins (standin.py) its numbers, one matrix at a time.

Here it is decided in which bits a matrix is kept: the checkpoint's own where it is quantised (packed.py), float16 where
that loses nothing (float16_weights.py), fewer where the server wants that (quantize.py), else as they are. So the
memory that loading takes is the blocks as they will be, and one matrix in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petals.models.blocks.standin import Recipe, StandIn, evaluate, matrices, packed_matrix
from petals.models.kernels.float16_weights import HALVED, HalfLinear, can_halve, halve
from petals.models.kernels.packed import Packed
from petals.models.kernels.packed_layers import Matrix, PackedExperts, PackedLinear
from petals.models.kernels.quantize import quantize_linear, quantize_matrix

EXPERTS = re.compile(r"expert|moe|block_?sparse", re.IGNORECASE)
"""Names of the classes that hold experts; others, such as convolutions, have weights of three dimensions, too."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """How weights are kept."""

    dtype: torch.dtype
    device: torch.device
    quant_type: str
    keep_transposed: bool

    @property
    def halves(self) -> bool:
        """Whether float32 weights are kept in half the bytes if float16 can hold them."""
        return self.quant_type == "none" and can_halve_for(self.dtype, self.device)


def can_halve_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products in `dtype` on `device` can read half the bytes."""
    return dtype == torch.float32 and device.type == "cpu" and can_halve()


class DenseMatrix:
    """A floating matrix (out, in) where a packed one may stand."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.shape = (len(weight), weight.shape[1])

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def times(self, rows: Tensor) -> Tensor:
        """rows (..., in) @ matrix.T: (..., out)."""
        return F.linear(rows, self.weight)

    def times_transposed(self, rows: Tensor) -> Tensor:
        """rows (..., out) @ matrix: (..., in)."""
        return rows @ self.weight

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(out, in)."""
        return self.weight.to(dtype)


@dataclass(frozen=True, slots=True)
class Proof:
    """A matrix that was made, and where its numbers can be read again: for the self-test."""

    path: str
    product: Callable[[Tensor], Tensor]
    """rows (rows, in) -> (rows, out), without bias."""
    numbers: Callable[[], Tensor]
    """(out, in), dequantised by the reference."""


def assemble(layer: nn.Module, keeping: Keeping) -> list[Proof]:
    """Replace all stand-ins of a block, in place; the block ends up on `keeping.device`.

    Raises: CheckpointError for files that are damaged. UnsupportedModel: bitsandbytes is needed and not installed.
    """
    proofs: list[Proof] = []
    for path, module in list(layer.named_modules()):
        recipes = {name: p.recipe for name, p in (*_own(module),) if isinstance(p, StandIn)}
        if type(module) in HALVED and "weight" in recipes:
            made = _linear(module, recipes, keeping)
            parent, _, leaf = path.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, made)
            proofs.append(Proof(path, _product_of(made), _numbers_of(recipes["weight"], type(module) is Conv1D)))
            continue
        for name, recipe in recipes.items():
            experts = _experts(module, name, recipe, keeping)
            if experts is None:
                _fill(module, name, recipe, keeping)
            else:
                del module._parameters[name]
                module.add_module(name, experts)
                proofs.append(_proof_of_experts(f"{path}.{name}", experts, recipe))
    layer.to(keeping.device)
    return proofs


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _linear(module: Any, recipes: dict[str, Recipe], keeping: Keeping) -> nn.Module:
    """What stands for a linear layer."""
    bias = evaluate(recipes["bias"]).to(keeping.dtype) if "bias" in recipes else None
    turned = type(module) is Conv1D
    if keeping.quant_type == "none" and not turned and (matrix := packed_matrix(recipes["weight"])) is not None:
        on_device = None if bias is None else bias.to(keeping.device)
        return PackedLinear(matrix.to(keeping.device), on_device, keeping.dtype)
    weight = evaluate(recipes["weight"]).to(keeping.dtype)
    if keeping.halves:
        half = halve(weight.t().contiguous() if turned else weight, bias, spent=True)
        if half is not None:
            return HalfLinear(half, bias, keep_transposed=keeping.keep_transposed)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    if keeping.quant_type == "none":
        return module.to(keeping.device)  # type: ignore[no-any-return]
    return quantize_linear(module, keeping.quant_type, keeping.device)


def _experts(module: nn.Module, name: str, recipe: Recipe, keeping: Keeping) -> PackedExperts | None:
    """What stands for a stack of experts; None: it is none, or is best kept as a tensor."""
    if name not in module._parameters or not EXPERTS.search(type(module).__name__):
        return None
    stand: Any = getattr(module, name)
    stack = matrices(recipe) if stand.ndim == 3 and stand.is_floating_point() else None
    if stack is None:
        return None
    recipes, flipped = stack
    packed = packed_matrix(recipes[0]) if keeping.quant_type == "none" else None
    if packed is None and keeping.quant_type == "none" and not keeping.halves:
        return None
    wanted = bool(getattr(module, "is_transposed", flipped))
    made: list[Matrix] = []
    for one in recipes:
        matrix: Packed | None = packed_matrix(one) if packed is not None else None
        if matrix is not None:
            made.append(matrix.to(keeping.device))
            continue
        weight = evaluate(one).to(keeping.dtype)
        made.append(_kept(weight.t().contiguous() if wanted != flipped else weight, keeping))
    return PackedExperts(made, flipped if packed is not None else wanted, keeping.dtype)


def _kept(weight: Tensor, keeping: Keeping) -> Matrix:
    if keeping.quant_type != "none":
        return quantize_matrix(weight, keeping.quant_type, keeping.device)
    return (halve(weight, spent=True) if keeping.halves else None) or DenseMatrix(weight.to(keeping.device))


def _fill(module: nn.Module, name: str, recipe: Recipe, keeping: Keeping) -> None:
    """A weight that is kept as a tensor, in the dtype that the library gave it; stacks matrix by matrix."""
    stand: Any = getattr(module, name)
    stack = matrices(recipe) if stand.ndim == 3 else None
    if stack is None:
        made = evaluate(recipe).to(device=keeping.device, dtype=stand.dtype)
    else:
        recipes, flipped = stack
        made = torch.empty(stand.shape, dtype=stand.dtype, device=keeping.device)
        for matrix, one in zip(made.transpose(1, 2) if flipped else made, recipes, strict=True):
            matrix.copy_(evaluate(one))
    if name in module._buffers:
        module._buffers[name] = made
    else:
        setattr(module, name, nn.Parameter(made, requires_grad=False))


def _product_of(made: nn.Module) -> Callable[[Tensor], Tensor]:
    def product(rows: Tensor) -> Tensor:
        outcome: Tensor = made(rows)
        bias: Any = getattr(made, "bias", None)
        return outcome if bias is None else outcome - bias.to(outcome)

    return product


def _numbers_of(recipe: Recipe, turned: bool) -> Callable[[], Tensor]:
    return lambda: evaluate(recipe).t() if turned else evaluate(recipe)


def _proof_of_experts(path: str, experts: PackedExperts, recipe: Recipe) -> Proof:
    """Of the last expert: of all, the one whose place is wrong if any is."""
    stack = matrices(recipe)
    assert stack is not None
    recipes, flipped = stack
    last = len(recipes) - 1

    def product(rows: Tensor) -> Tensor:
        factor = experts[last]
        return F.linear(rows, factor.T if flipped else factor)

    return Proof(path, product, lambda: evaluate(recipes[last]))
