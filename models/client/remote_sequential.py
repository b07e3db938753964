"""The stack of blocks as an `nn.Module`, wherever the blocks are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from petals.models.blocks.adapters import Lora
from petals.models.client.blockwise import forward_blockwise
from petals.models.client.chain import BlockChain, ChainSession
from petals.models.client.generation import ChainCache
from petals.models.errors import BlockRangeError


@dataclass(frozen=True, slots=True)
class Call:
    """What the base model around the blocks was called with."""

    attention_mask: Tensor | None = None
    cache: ChainCache | None = None
    prompts: Tensor | None = None
    """Of deep prompt tuning, (blocks, batch, prefix, hidden_size)."""
    lora: Lora | None = None
    outputs: list[Tensor] | None = None
    """Filled with what goes into the first block and what every block puts out, when that was asked for."""


class RemoteSequential(nn.Module):
    """Consecutive blocks of a model over a `BlockChain`: `len`, iteration, `h[5]`, `h[3:7](hidden)`; differentiable.

    In a family's own base model it stands where the list of blocks was. The base model's loop over its list must see
    one "block" that is all of them, so that a step is one round trip and not one per block: while the base model runs
    (`called_with`), iteration and slicing yield just that.
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
        call: Call | None = getattr(self._local, "call", None)
        if call is None:
            return self.chain.forward(hidden, **kwargs)
        output = hidden if getattr(self._local, "pretending", False) else self._run(hidden, call)
        return (output,) if self.wants_tuple else output

    def _run(self, hidden: Tensor, call: Call) -> Tensor:
        mask, prompts, lora = call.attention_mask, call.prompts, call.lora
        if call.outputs is not None:
            call.outputs.append(hidden)
        if call.cache is not None:
            return call.cache.step(hidden, mask, prompts, call.outputs)
        if call.outputs is None:
            return self.chain.forward(hidden, attention_mask=mask, prompts=prompts, lora=lora)
        call.outputs.extend(forward_blockwise(self.chain, hidden, attention_mask=mask, prompts=prompts, lora=lora))
        return call.outputs[-1]

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

    @contextmanager
    def called_with(self, call: Call) -> Iterator[None]:
        """While open, the base model around us runs its loop in this thread."""
        self._local.call = call
        try:
            yield
        finally:
            self._local.call = None

    @contextmanager
    def pretending(self) -> Iterator[None]:
        """Blocks that do nothing, in this thread."""
        self._local.pretending = True
        try:
            yield
        finally:
            self._local.pretending = False
