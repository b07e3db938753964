"""How many blocks fit into this machine's memory, beside the KV budget and the room a step computes in."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from petals.models.checkpoint import Checkpoint
from petals.models.loading import block_numel
from petals.peer.config import ServeConfig
from petals.peer.server.placement import blocks_that_fit
from petals.peer.server.service import compute_dtype, device_of
from petals.protocols.errors import UserError

BYTES_PER_WEIGHT = {"int8": 1.02, "nf4": 0.57}
"""Scales included; measured in docs/models.md. Unquantised: the dtype's."""
WORKSPACE_TENSORS = 8
"""Tensors of (tokens, 4 x hidden) float32 alive at once in one step, generously: the MLP's and the attention's."""

CONTROL_GROUP = Path("/sys/fs/cgroup")


def capacity_of(checkpoint: Checkpoint, config: ServeConfig) -> tuple[int, str]:
    """How many blocks to hold, and why, in one line.

    Raises:
        UserError: not even one fits; says what to lower.
    """
    device = device_of(config)
    free = free_bytes(device)
    per_weight = BYTES_PER_WEIGHT.get(config.quant_type, compute_dtype(config, checkpoint).itemsize)
    block = int(block_numel(checkpoint.config) * per_weight)
    workspace = WORKSPACE_TENSORS * min(config.max_batch_tokens, 4096) * 4 * checkpoint.hidden_size * 4
    count = min(checkpoint.num_blocks, blocks_that_fit(free, block, config.cache_bytes, workspace))
    why = (
        f"{_mb(free)} of memory are free: {_mb(config.cache_bytes)} for the cache, {_mb(workspace)} to compute in, "
        f"{_mb(block)} for each block"
    )
    if count < 1:
        raise UserError(f"{why}: not one fits; lower --cache_mb or choose --quant_type int8 or nf4")
    return count, f"{why}, so {count} of {checkpoint.num_blocks} blocks"


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on `device`; a container's own limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CONTROL_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free  # no control group of the second version
    return free if limit == "max" else min(free, int(limit) - int(used))


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
