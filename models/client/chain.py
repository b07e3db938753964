"""The socket: what a client model needs from "all the blocks", whether they are at home or across the swarm.

`models` offers this socket and `LocalChain`, the exact reference; `petals.peer.client` brings the remote plug.
Both are synchronous: `transformers`' generation code and autograd call them from an ordinary thread.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from petals.models.blocks.adapters import Lora


class ChainSession(Protocol):
    """KV caches for one batch over all blocks of a chain. A context manager; leaving it gives the caches back."""

    @property
    def blocks(self) -> range: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def max_length(self) -> int:
        """Tokens per row the session has room for, prompt included."""
        ...

    @property
    def position(self) -> int:
        """Tokens per row already in the caches. Setting a smaller value rolls the caches back to it."""
        ...

    @position.setter
    def position(self, value: int) -> None: ...

    def step(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None = None,
        prompts: Tensor | None = None,
        hypo_ids: Tensor | None = None,
    ) -> Tensor:
        """Run new tokens through every block of the chain and extend the caches.

        Args:
            hidden: (batch, new_tokens, hidden_size), floating, any device.
            attention_mask: (batch, position + new_tokens), int64 or bool, 1 = a real token; None: all real. Blocks
                derive position ids from it as `transformers.generate` does for left-padded batches.
            prompts: (len(blocks), batch, prefix_length, hidden_size) added to the first `prefix_length` positions
                of each block's input (deep prompt tuning); only on the step that starts at position 0.
            hypo_ids: (batch,) int64; before the step, cache row i becomes old row hypo_ids[i]. None: keep.
        Returns: (batch, new_tokens, hidden_size), dtype and device of `hidden`; carries no gradient.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...


class BlockChain(Protocol):
    """Consecutive transformer blocks of one model."""

    @property
    def blocks(self) -> range:
        """Absolute indices of the blocks in the model, half-open, step 1."""
        ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the blocks compute in; `hidden` may come in another and is converted."""
        ...

    def open_session(self, *, batch_size: int, max_length: int, lora: Lora | None = None) -> ChainSession:
        """Reserve caches of `batch_size` x `max_length` tokens on every block; `lora` as it is now, for all steps."""
        ...

    def forward(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None = None,
        prompts: Tensor | None = None,
        lora: Lora | None = None,
    ) -> Tensor:
        """All blocks without cache, shapes as in `step`. Differentiable with respect to `hidden`, `prompts` and the
        factors of `lora`, low-rank updates that the caller trains."""
        ...

    def slice(self, blocks: range) -> BlockChain:
        """The chain of a sub-range (absolute indices) of these blocks; shares everything with this one."""
        ...
