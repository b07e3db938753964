"""How many blocks fit into this machine's memory, beside the KV budget and the room a step computes in."""

from __future__ import annotations

from dataclasses import dataclass

from petals.models.source.checkpoint import Checkpoint
from petals.models.source.sizing import sizes_of
from petals.peer.base.config import ServeConfig
from petals.peer.server.device import compute_dtype, device_of
from petals.peer.server.memory import free_bytes
from petals.peer.server.placement import blocks_that_fit
from petals.protocols.errors import UserError

WORKSPACE_TENSORS = 8
"""Tensors of (tokens, 4 x hidden) float32 alive at once in one step, generously: the MLP's and the attention's."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What serving takes and what there is, in bytes."""

    free: int
    cache: int
    workspace: int
    """Room that one step computes in, or that loading takes beyond the weights; they are not at the same time."""
    blocks: tuple[int, ...]
    """Weights of every block of the model."""

    @property
    def block(self) -> int:
        """Weights of the largest block."""
        return max(self.blocks)

    def weights(self, blocks: range) -> int:
        """Of these blocks."""
        return sum(self.blocks[blocks.start : blocks.stop])

    def holds(self, blocks: range, times: int = 1) -> bool:
        """Whether these blocks fit, and so many times their weights."""
        return blocks_that_fit(self.free, max(1, times * self.weights(blocks)), self.cache, self.workspace) >= 1


def memory_of(checkpoint: Checkpoint, config: ServeConfig) -> Memory:
    """Known from the headers of the model's files, or from its configuration; no weights are read."""
    device = device_of(config)
    sizes = sizes_of(checkpoint, compute_dtype(config, checkpoint), device, config.quant_type)
    step = WORKSPACE_TENSORS * min(config.max_batch_tokens, 4096) * 4 * checkpoint.hidden_size * 4
    return Memory(
        free=free_bytes(device),
        cache=config.cache_bytes,
        workspace=max(step, sizes.loading),
        blocks=sizes.kept,
    )


def room_to_train(checkpoint: Checkpoint, config: ServeConfig, blocks: range) -> bool:
    """Whether these blocks, not loaded yet, could take as much memory again: training is faster then (halves.py)."""
    return memory_of(checkpoint, config).holds(blocks, 2)


def capacity_of(checkpoint: Checkpoint, config: ServeConfig) -> tuple[int, str]:
    """How many blocks to hold, and why, in one line.

    Raises:
        UserError: not even one fits; says what to lower.
    """
    memory = memory_of(checkpoint, config)
    count = min(checkpoint.num_blocks, blocks_that_fit(memory.free, memory.block, memory.cache, memory.workspace))
    why = (
        f"{_mb(memory.free)} of memory are free: {_mb(memory.cache)} for the cache, {_mb(memory.workspace)} to compute "
        f"in, {_mb(memory.block)} for each block"
    )
    if count < 1:
        raise UserError(f"{why}: not one fits; lower --cache_mb or choose --quant_type int8 or nf4")
    return count, f"{why}, so {count} of {checkpoint.num_blocks} blocks"


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
