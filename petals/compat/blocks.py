"""A block at home, by Petals' name for it."""

from __future__ import annotations

from typing import Any

import torch

from petals.models.client.local import LocalChain
from petals.models.client.remote_sequential import RemoteSequential
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span


def load_pretrained_block(
    model_name: str,
    block_index: int,
    *,
    config: Any = None,
    torch_dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    token: str | None = None,
) -> RemoteSequential:
    """One block, loaded here: call it with hidden states (batch, tokens, hidden_size).

    Args:
        config: taken for old programs' sake; the checkpoint's own is read.
        torch_dtype: "auto": the checkpoint's own.
    Raises:
        CheckpointError, BlockRangeError.
    """
    checkpoint = open_checkpoint(model_name, revision=revision, token=token)
    named = None if torch_dtype == "auto" else getattr(torch, str(torch_dtype).removeprefix("torch."))
    span = load_span(checkpoint, range(block_index, block_index + 1), dtype=named or checkpoint.dtype)
    return RemoteSequential(LocalChain(span))
