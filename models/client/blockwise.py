"""A session that sees what every block puts out: one session per block, one step after another."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Self

from torch import Tensor

from petals.models.blocks.adapters import Lora
from petals.models.client.chain import BlockChain, ChainSession


class BlockwiseSession:
    """A `ChainSession` whose `outputs` are those of every block at the last step. Costs a round trip per block."""

    def __init__(self, chain: BlockChain, *, batch_size: int, max_length: int, lora: Lora | None = None) -> None:
        self.blocks = chain.blocks
        self.batch_size = batch_size
        self.max_length = max_length
        self.outputs: list[Tensor] = []
        """(batch, new_tokens, hidden_size) each, in the order of the blocks."""
        self._sessions: list[ChainSession] = []
        with contextlib.ExitStack() as opened:
            for block in chain.blocks:
                part = chain.slice(range(block, block + 1))
                session = part.open_session(batch_size=batch_size, max_length=max_length, lora=lora)
                self._sessions.append(opened.enter_context(session))
            opened.pop_all()

    @property
    def position(self) -> int:
        return self._sessions[-1].position

    @position.setter
    def position(self, value: int) -> None:
        for session in self._sessions:
            session.position = value

    def step(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None = None,
        prompts: Tensor | None = None,
        hypo_ids: Tensor | None = None,
    ) -> Tensor:
        """See `ChainSession.step`."""
        self.outputs = []
        for index, session in enumerate(self._sessions):
            prompt = None if prompts is None else prompts[index : index + 1]
            hidden = session.step(hidden, attention_mask=attention_mask, prompts=prompt, hypo_ids=hypo_ids)
            self.outputs.append(hidden)
        return hidden

    def close(self) -> None:
        """Give all caches back."""
        with contextlib.ExitStack() as closing:
            for session in self._sessions:
                closing.callback(session.close)

    def abandon(self) -> None:
        """`close`, without waiting for anybody."""
        for session in self._sessions:
            getattr(session, "abandon", session.close)()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def forward_blockwise(
    chain: BlockChain, hidden: Tensor, *, attention_mask: Tensor | None, prompts: Tensor | None, lora: Lora | None
) -> list[Tensor]:
    """What every block puts out, as `BlockChain.forward` would compute it; differentiable."""
    outputs: list[Tensor] = []
    for index, block in enumerate(chain.blocks):
        part = range(block, block + 1)
        hidden = chain.slice(part).forward(
            hidden,
            attention_mask=attention_mask,
            prompts=None if prompts is None else prompts[index : index + 1],
            lora=None if lora is None else lora.of(part),
        )
        outputs.append(hidden)
    return outputs
