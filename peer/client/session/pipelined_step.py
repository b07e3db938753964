"""A long prompt through all hops of a session, piece by piece, so that all of them compute at the same time.

Each hop has a task that sends pieces as they arrive from the hop before and passes on what comes back. When a hop
fails, those before it finish their pieces and those behind it what has reached them; then it is replaced, its
replacement is told the pieces it had answered, and the flow goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import trio
from torch import Tensor

from petals.peer.client.hops.hop import Hop, StepInput, StepOutput
from petals.peer.client.hops.replay import in_chunks
from petals.protocols.errors import RemoteError

if TYPE_CHECKING:
    from petals.peer.client.session.session import RemoteSession

PIECE_TOKENS = 128
"""Of all rows together. Halving it from 256 costs little compute and lets the last server begin sooner."""


def is_long(step: StepInput, piece_tokens: int) -> bool:
    """Whether a step is worth cutting: two whole pieces, and nothing in it that must stay together."""
    rows, tokens = step.hidden.shape[:2]
    return step.prompts is None and tokens >= 2 * max(1, piece_tokens // rows)


@dataclass(eq=False)
class _Progress:
    """How far one hop has come."""

    answered: int = 0
    round_trip_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    sent_at: float = 0.0
    """Of the first piece."""

    def note(self, output: StepOutput) -> None:
        if not self.answered:
            self.sent_at = output.sent_at
        self.answered += 1
        self.round_trip_s += output.round_trip_s
        self.queue_s += output.queue_s
        self.compute_s += output.compute_s


@dataclass(eq=False)
class PipelinedStep:
    """Runs `current` through all hops of a session in pieces.

    Args:
        replay_order: the row order that a replacement has to be told instead of `current.hypo_ids`.
    """

    session: RemoteSession
    current: StepInput
    replay_order: Tensor | None
    piece_tokens: int
    _pieces: list[StepInput] = field(default_factory=list)
    _arrived: dict[int, list[Tensor]] = field(default_factory=dict)
    """Block -> what enters it, piece by piece; past the last block: what comes out."""
    _progress: dict[int, _Progress] = field(default_factory=dict)
    """By the identity of the hop."""

    @property
    def done(self) -> list[tuple[Hop, StepOutput]]:
        """Where the time went, all pieces together; the times of different hops overlap."""
        return [
            (
                hop,
                StepOutput(None, progress.round_trip_s, progress.queue_s, progress.compute_s, sent_at=progress.sent_at),
            )
            for hop in self.session.hops
            for progress in [self._progress[id(hop)]]
        ]

    async def run(self) -> Tensor:
        """The output of the last hop, of all pieces.

        Raises:
            MissingBlocks, RemoteError: a hop failed and could not be replaced.
        """
        blocks, rows = self.session.blocks, self.current.hidden.shape[0]
        self._pieces = in_chunks(self.current, max(1, self.piece_tokens // rows))
        self._pieces[0] = replace(self._pieces[0], hypo_ids=self.current.hypo_ids)
        self._arrived[blocks.start] = [piece.hidden for piece in self._pieces]
        for hop in self.session.hops:
            self._progress[id(hop)] = _Progress()
            self._arrived[hop.blocks.stop] = []
        failures = 0
        while failed := await self._flow():
            for lost, error in failed:
                failures += 1
                await self._replace(lost, error, failures)
        return torch.cat(self._arrived[blocks.stop], dim=1)

    async def _replace(self, lost: Hop, error: RemoteError, failures: int) -> None:
        kept = self._progress.pop(id(lost))
        await self.session.recovery.replace(lost, error, failures)
        for hop in self.session.hops:
            if id(hop) not in self._progress:
                self._progress[id(hop)] = replace(kept)
                if hop.blocks.stop != lost.blocks.stop:  # nobody needs what passed here before
                    self._arrived[hop.blocks.stop] = [torch.empty(0)] * kept.answered

    async def _flow(self) -> list[tuple[Hop, RemoteError]]:
        """Let the pieces flow until all have arrived, or nothing flows any more because of the hops that failed."""
        failed: list[tuple[Hop, RemoteError]] = []
        ways = [trio.open_memory_channel[int](len(self._pieces)) for _ in self.session.hops]
        async with trio.open_nursery() as nursery:
            for (send, receive), hop, onward in zip(
                ways, self.session.hops, [*(send for send, _ in ways[1:]), None], strict=True
            ):
                waiting = range(self._progress[id(hop)].answered, len(self._arrived[hop.blocks.start]))
                for index in waiting:
                    send.send_nowait(index)
                if hop is self.session.hops[0]:
                    send.close()
                nursery.start_soon(partial(self._stage, hop, receive, onward, failed))
        return failed

    async def _stage(
        self,
        hop: Hop,
        indices: trio.MemoryReceiveChannel[int],
        onward: trio.MemorySendChannel[int] | None,
        failed: list[tuple[Hop, RemoteError]],
    ) -> None:
        progress, outputs = self._progress[id(hop)], self._arrived[hop.blocks.stop]

        def take(output: StepOutput) -> None:
            assert output.hidden is not None
            outputs.append(output.hidden.to(self.current.hidden.dtype))
            progress.note(output)
            if onward is not None:
                onward.send_nowait(len(outputs) - 1)

        try:
            await hop.pipe(indices, partial(self._told, hop), take)
        except RemoteError as error:
            failed.append((hop, error))
        finally:
            if onward is not None:
                onward.close()

    def _told(self, hop: Hop, index: int) -> tuple[StepInput, StepInput]:
        """What the hop is told as piece `index`, and what it must be remembered as."""
        told = replace(self._pieces[index], hidden=self._arrived[hop.blocks.start][index])
        if index or self.replay_order is told.hypo_ids:
            return told, told
        remembered = replace(told, hypo_ids=self.replay_order)
        return (remembered if hop.rebuilt else told), remembered
