"""The stack of blocks as an `nn.Module`, wherever the blocks are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from petals.models.chain import BlockChain, ChainSession
from petals.models.errors import BlockRangeError
from petals.models.generation import ChainCache


@dataclass(slots=True)
class _Call:
    """What the base model around us was called with."""

    attention_mask: Tensor | None
    cache: ChainCache | None


class RemoteSequential(nn.Module):
    """Consecutive blocks of a model over a `BlockChain`: `len`, iteration, `h[5]`, `h[3:7](hidden)`; differentiable.

    In a family's own base model it stands where the list of blocks was. The base model's loop over its list must see
    one "block" that is all of them, so that a step is one round trip and not one per block: while the base model runs
    (`calling`), iteration and slicing yield just that.
    """

    def __init__(self, chain: BlockChain | None = None) -> None:
        super().__init__()
        self.wants_tuple = False
        """What the family's own loop expects of a block: a tensor, or a tuple that starts with it."""
        self._chain = chain
        self._local = threading.local()

    @property
    def chain(self) -> BlockChain:
        """The blocks; set once the model around is loaded."""
        if self._chain is None:
            raise BlockRangeError("this model is not connected to any blocks")
        return self._chain

    def connect(self, chain: BlockChain) -> None:
        """Plug in the blocks."""
        self._chain = chain

    @property
    def start_block(self) -> int:
        return self.chain.blocks.start

    @property
    def end_block(self) -> int:
        return self.chain.blocks.stop

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(batch, tokens, hidden_size) through all blocks.

        Called by a user, differentiable and without cache. Called by the base model around us, with the cache it was
        given; what else it passes (masks, rotary embeddings) was made for a local block and is not needed.
        """
        call: _Call | None = getattr(self._local, "call", None)
        if call is None:
            return self.chain.forward(hidden, **kwargs)
        if getattr(self._local, "pretending", False):
            output = hidden
        elif call.cache is not None:
            output = call.cache.step(hidden, call.attention_mask)
        else:
            output = self.chain.forward(hidden, attention_mask=call.attention_mask)
        return (output,) if self.wants_tuple else output

    def inference_session(self, *, max_length: int, batch_size: int = 1) -> ChainSession:
        """Caches for raw hidden states over these blocks."""
        return self.chain.open_session(batch_size=batch_size, max_length=max_length)

    def __len__(self) -> int:
        return 1 if self._inside else len(self.chain.blocks)

    def __iter__(self) -> Iterator[RemoteSequential]:
        if self._inside:
            return iter([self])
        return iter([self[index] for index in range(len(self))])

    def __getitem__(self, index: int | slice) -> RemoteSequential:
        if self._inside:
            return self
        blocks = self.chain.blocks[index]
        if isinstance(blocks, int):
            blocks = range(blocks, blocks + 1)
        if not len(blocks) or blocks.step != 1:
            raise BlockRangeError(f"{index} picks no consecutive blocks out of {len(self)}")
        return RemoteSequential(self.chain.slice(blocks))

    @property
    def _inside(self) -> bool:
        return getattr(self._local, "call", None) is not None

    def calling(self, attention_mask: Tensor | None, cache: ChainCache | None) -> None:
        """The base model around us starts its loop in this thread."""
        self._local.call = _Call(attention_mask, cache)

    def called(self) -> None:
        """The base model around us has ended, or failed."""
        self._local.call = None

    @contextmanager
    def pretending(self) -> Iterator[None]:
        """Blocks that do nothing, in this thread."""
        self._local.pretending = True
        try:
            yield
        finally:
            self._local.pretending = False
