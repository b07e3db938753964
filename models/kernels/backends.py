from __future__ import annotations

from torch import Tensor


def fp8(rows: Tensor, codes: Tensor, scale: Tensor, block: tuple[int, int], skipped: int) -> Tensor | None:
    return None


def nibbles(
    rows: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor, group: int
) -> Tensor | None:
    return None


def ggml(rows: Tensor, blocks: Tensor, kind: str) -> Tensor | None:
    return None
