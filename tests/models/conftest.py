"""Tiny checkpoints shared by the tests of this room, each made once per run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from petals.models.blocks.block import BlockSpan
from petals.models.kernels.float16_weights import HalfLinear
from petals.models.source.checkpoint import Checkpoint, open_checkpoint
from petals.models.source.loading import load_span
from tests.models.tiny import CASES, Case, Reference, save_tiny


@dataclass(frozen=True)
class Tiny:
    """One family's tiny checkpoint, its own full model, and the blocks loaded by us in one and in two pieces."""

    case: Case
    directory: Path
    reference: Reference
    checkpoint: Checkpoint
    whole: BlockSpan
    parts: tuple[BlockSpan, BlockSpan]


def load_stock(checkpoint: Checkpoint, blocks: range) -> BlockSpan:
    """Blocks whose float32 weights are float32, as on a machine without FBGEMM (float16_weights.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("petals.models.blocks.assemble.can_halve", lambda: False)
        span = load_span(checkpoint, blocks, dtype=torch.float32)
    assert not any(isinstance(module, HalfLinear) for layer in span.layers() for module in layer.modules())
    return span


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Tiny]:
    """Makes, or remembers, the tiny checkpoint of a case."""
    made: dict[str, Tiny] = {}

    def make(case: Case) -> Tiny:
        if case.id not in made:
            directory = tmp_path_factory.mktemp(case.id)
            model = save_tiny(case, directory)
            checkpoint = open_checkpoint(directory)
            end = checkpoint.num_blocks
            made[case.id] = Tiny(
                case,
                directory,
                Reference(model),
                checkpoint,
                load_span(checkpoint, range(end)),
                (load_span(checkpoint, range(1)), load_span(checkpoint, range(1, end))),
            )
        return made[case.id]

    return make


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def tiny(request: pytest.FixtureRequest, make_tiny: Callable[[Case], Tiny]) -> Tiny:
    """Every family, one after another."""
    return make_tiny(request.param)


@pytest.fixture
def llama(make_tiny: Callable[[Case], Tiny]) -> Tiny:
    return make_tiny(next(case for case in CASES if case.id == "llama"))


@pytest.fixture
def bloom(make_tiny: Callable[[Case], Tiny]) -> Tiny:
    return make_tiny(next(case for case in CASES if case.id == "bloom"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny products are faster on one thread, and CI's two cores run other things."""
    torch.set_num_threads(1)
