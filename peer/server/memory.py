"""How much memory can still be had."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")
MARGIN_BYTES = 128 << 20
"""Of main memory that leases leave alone: what else this process needs, and what others take in the meantime."""


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_bytes()


def free_host_bytes() -> int:
    """Main memory that can still be had; a container's own limit counts."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CONTROL_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        kept = (CONTROL_GROUP / "memory.stat").read_text()
    except OSError:
        return free  # no control group of the second version
    if limit == "max":
        return free
    # Files that were read count as used, though they give way: the weights, above all.
    stat = dict(line.split(" ", 1) for line in kept.splitlines() if " " in line)
    return min(free, int(limit) - int(used) + int(stat.get("inactive_file", 0)))


def leasable_bytes(device: torch.device) -> float:
    """What a cache of a new session may take now, whatever the budget says.

    The budget's pages are not touched before they are used, so that a server that rests is small; other programs may
    have taken that memory since. On a GPU the allocator keeps what it once had: there is no limit but the budget.
    """
    return free_host_bytes() - MARGIN_BYTES if device.type == "cpu" else math.inf
