"""The plug for models' socket: a `BlockChain` whose blocks live in the swarm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
import trio
from torch import Tensor

from petals.models.blocks.adapters import Lora
from petals.peer.base.portal import Portal
from petals.peer.client.sequence_manager import RemoteSequenceManager
from petals.peer.client.session.session import HopTrace, RemoteSession
from petals.peer.client.training import BatchTrainer, Companions, Gradients
from petals.protocols.errors import UserError


class RemoteChainSession:
    """A `ChainSession` over the swarm; called from a torch thread, runs in the trio thread."""

    def __init__(self, portal: Portal, session: RemoteSession) -> None:
        self._portal = portal
        self.remote = session
        self._open = True

    @property
    def blocks(self) -> range:
        return self.remote.blocks

    @property
    def batch_size(self) -> int:
        return self.remote.spec.batch_size

    @property
    def max_length(self) -> int:
        return self.remote.spec.max_length

    @property
    def position(self) -> int:
        return self.remote.position

    @position.setter
    def position(self, value: int) -> None:
        self.remote.rollback(value)

    @property
    def trace(self) -> tuple[HopTrace, ...]:
        """Where the last step's time went, hop by hop."""
        return self.remote.last_trace

    def step(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None = None,
        prompts: Tensor | None = None,
        hypo_ids: Tensor | None = None,
    ) -> Tensor:
        """See `ChainSession.step`.

        Raises:
            UserError: gradients were asked for, or more tokens than the session has room for.
            MissingBlocks, RemoteError: no server could be found to go on with.
        """
        if torch.is_grad_enabled() and (hidden.requires_grad or (prompts is not None and prompts.requires_grad)):
            raise UserError("an inference session carries no gradients: use forward(), or torch.no_grad()")
        output = self._portal.run(
            partial(
                self.remote.step,
                _to_wire(hidden),
                attention_mask=None if attention_mask is None else attention_mask.detach().cpu().bool(),
                prompts=None if prompts is None else _to_wire(prompts),
                hypo_ids=None if hypo_ids is None else hypo_ids.detach().cpu().long(),
            )
        )
        return output.to(device=hidden.device, dtype=hidden.dtype)

    def close(self) -> None:
        """Give the leases back. Idempotent."""
        if self._open:
            self._open = False
            self._portal.run(self.remote.close)

    def abandon(self) -> None:
        """`close` from any thread, without waiting: for whoever is collected as garbage."""
        if self._open:
            self._open = False
            with suppress(trio.RunFinishedError):
                self._portal.token.run_sync_soon(trio.lowlevel.spawn_system_task, self.remote.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class RemoteChain:
    """A `BlockChain` over the swarm.

    Args:
        open_session: (blocks, batch_size, max_length, lora, prefix) -> an open session.
        trainer: what a `forward` and its gradients are computed with now.
        view: (blocks) -> who computes them.
        dtype: what hidden states are computed in at the servers, as far as known.
    """

    def __init__(
        self,
        portal: Portal,
        blocks: range,
        hidden_size: int,
        dtype: torch.dtype,
        open_session: Callable[[range, int, int, Lora | None, Any], Any],
        trainer: Callable[[], BatchTrainer],
        view: Callable[[range], RemoteSequenceManager],
    ) -> None:
        self.blocks = blocks
        self.hidden_size = hidden_size
        self.dtype = dtype
        self._portal = portal
        self._open_session = open_session
        self._trainer = trainer
        self._view = view

    @property
    def sequence_manager(self) -> RemoteSequenceManager:
        """Who computes these blocks."""
        return self._view(self.blocks)

    def open_session(
        self, *, batch_size: int, max_length: int, lora: Lora | None = None, prefix: Any = None
    ) -> RemoteChainSession:
        """Lease caches on every hop of a route.

        Args:
            prefix: a `Prefix`, as `ModelClient.open_session` takes it.
        Raises:
            MissingBlocks, RemoteError: in bounded time.
        """
        sent = None if lora is None else lora.of(self.blocks).detached()
        session = self._portal.run(self._open_session, self.blocks, batch_size, max_length, sent, prefix)
        return RemoteChainSession(self._portal, session)

    def forward(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None = None,
        prompts: Tensor | None = None,
        lora: Lora | None = None,
    ) -> Tensor:
        """See `BlockChain.forward`; the gradients are computed by the swarm."""
        mine = None if lora is None else lora.of(self.blocks)
        companions = Companions(
            blocks=self.blocks,
            attention_mask=None if attention_mask is None else attention_mask.detach().cpu().bool(),
            prompts=None if prompts is None else _to_wire(prompts),
            lora=None if mine is None else mine.detached(),
        )
        factors = () if mine is None else mine.factors()
        output: Tensor = _RemoteBlocks.apply(hidden, prompts, self, companions, *factors)  # type: ignore[no-untyped-call]
        return output

    def slice(self, blocks: range) -> RemoteChain:
        """The chain of a sub-range (absolute indices)."""
        if not self.blocks.start <= blocks.start < blocks.stop <= self.blocks.stop:
            raise IndexError(f"blocks {blocks.start}:{blocks.stop} are not in {self.blocks.start}:{self.blocks.stop}")
        return RemoteChain(
            self._portal, blocks, self.hidden_size, self.dtype, self._open_session, self._trainer, self._view
        )

    def run_forward(self, hidden: Tensor, companions: Companions) -> tuple[Tensor, Callable[[Tensor], Gradients]]:
        """Numbers only; called by the autograd function in whatever thread runs it.

        Returns: the output, and what turns its gradient into those of the inputs, which autograd calls from its own
        threads.
        """
        trainer = self._trainer()  # for the gradients, too, whatever is wanted of the swarm by then
        output, spans = self._portal.run(trainer.forward, hidden, companions)
        return output, lambda grad: self._portal.run(trainer.backward, grad, spans, companions)


class _RemoteBlocks(torch.autograd.Function):
    """Forward and backward of a chain of remote blocks; keeps the input of every span."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, prompts: Tensor | None, chain: RemoteChain, companions: Companions, *factors: Tensor
    ) -> Tensor:
        output, ctx.run_backward = chain.run_forward(_to_wire(hidden), companions)
        ctx.lora = companions.lora
        return output.to(device=hidden.device, dtype=hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Gradients = ctx.run_backward(_to_wire(grad_output))
        grad = gradients.hidden.to(device=grad_output.device, dtype=grad_output.dtype)
        places = [] if ctx.lora is None else ctx.lora.layers
        factors = [factor for place in places for factor in gradients.lora[place]]
        return grad, gradients.prompts, None, None, *factors


def _to_wire(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
