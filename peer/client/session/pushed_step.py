"""One step whose activations go straight from server to server; only the last answer is waited for on purpose.

Every hop is told of the step at once. The first one gets its input from us; each pushes its output to the next one and
sends us a copy, which becomes the next hop's history. A copy needs no longer than the push and the next hop's compute,
so it costs no time. Each hop is minded by a task of its own: if its push does not come, it is supplied with the copy;
if it fails, it is replaced and told directly, while those behind it wait, as they would have anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import trio
from torch import Tensor

from petals.peer.client.hops.hop import Hop, StepInput, StepOutput, for_blocks
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import PeerUnreachable, RemoteError, SwarmError

if TYPE_CHECKING:
    from petals.peer.client.session.session import RemoteSession

FIRST_GRACE_S = 1.0
GRACE_S = 0.25
"""How long after the copy has come the answer of the next hop may take before it is supplied with the copy: at least
this, and several times what it took so far. A supply for nothing costs its bytes."""


@dataclass(eq=False)
class _Output:
    """What one hop put out, once it is known."""

    known: trio.Event = field(default_factory=trio.Event)
    hidden: Tensor | None = None
    pushed: bool = False
    """By the very server that the next hop expects it from."""

    async def get(self) -> Tensor:
        await self.known.wait()
        assert self.hidden is not None
        return self.hidden


class PushedStep:
    """Runs `current` through all hops of a session."""

    def __init__(self, session: RemoteSession, current: StepInput, replay_order: Tensor | None) -> None:
        self._session = session
        self._current = current
        self._replay_order = replay_order
        self._hops = list(session.hops)
        self._targets = [hop.push_target() for hop in self._hops]
        self._outputs = [_Output() for _ in self._hops]
        self.done: list[tuple[Hop, StepOutput]] = []

    async def run(self) -> Tensor:
        """The output of the last hop.

        Raises:
            MissingBlocks, RemoteError: a hop failed and could not be replaced.
        """
        errors: list[SwarmError] = []

        async def mind(index: int) -> None:
            try:
                await self._leg(index)
            except SwarmError as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for index in reversed(range(len(self._hops))):
                nursery.start_soon(mind, index)
        if errors:
            raise errors[0]
        return await self._outputs[-1].get()

    async def _leg(self, index: int) -> None:
        hop, output = self._hops[index], self._outputs[index]
        try:
            answer = await (self._direct(index) if not self._is_pushed(index) else self._pushed(index))
        except RemoteError as error:
            hidden = await self._input(index)
            output.hidden = await self._session.redo(
                hop, error, replace(self._current, hidden=hidden), self._replay_order, self.done
            )
        else:
            assert answer.hidden is not None
            self.done.append((hop, answer))
            output.hidden, output.pushed = answer.hidden.to(self._current.hidden.dtype), True
        output.known.set()

    async def _direct(self, index: int) -> StepOutput:
        hop, told = self._hops[index], self._told(index, await self._input(index))
        return await hop.step(told, replayed_as=self._remembered(told), push_to=self._push_to(index))

    async def _pushed(self, index: int) -> StepOutput:
        hop, before = self._hops[index], self._outputs[index - 1]
        shape = self._told(index, self._current.hidden)
        await hop.announce(shape, pushed_by=self._hops[index - 1].peer_id, push_to=self._push_to(index))
        failed: list[RemoteError] = []
        copied_at = math.inf

        async def mind() -> None:
            nonlocal copied_at
            hidden = await before.get()
            copied_at = trio.current_time()
            tokens = hidden.shape[1]
            if before.pushed:
                known = not math.isnan(hop.s_per_token)
                await trio.sleep(max(GRACE_S, 5 * hop.s_per_token * tokens) if known else FIRST_GRACE_S)
            try:
                await hop.supply(hidden)
            except RemoteError as error:
                failed.append(error)
            else:
                await trio.sleep(hop.deadline_s(tokens))
                failed.append(PeerUnreachable(f"peer …{hop.peer_id[-6:]} did not answer in time", hop.peer_id))
            nursery.cancel_scope.cancel()

        answer: StepOutput | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mind)
            try:
                answer = await hop.answer(shape)
            except RemoteError as error:
                failed.insert(0, error)
            nursery.cancel_scope.cancel()
        if answer is None:
            raise failed[0]
        if answer.supplied and before.pushed:
            self._session.unpushable.add((self._hops[index - 1].peer_id, hop.peer_id))
        told = self._told(index, await before.get())
        round_trip_s = max(0.0, trio.current_time() - copied_at) if copied_at < math.inf else answer.compute_s
        answer = replace(answer, round_trip_s=round_trip_s)
        hop.remember(self._remembered(told) or told, answer)
        return answer

    async def _input(self, index: int) -> Tensor:
        return self._current.hidden if index == 0 else await self._outputs[index - 1].get()

    def _told(self, index: int, hidden: Tensor) -> StepInput:
        return for_blocks(replace(self._current, hidden=hidden), self._session.blocks, self._hops[index].blocks)

    def _remembered(self, told: StepInput) -> StepInput | None:
        return replace(told, hypo_ids=self._replay_order) if self._replay_order is not told.hypo_ids else None

    def _is_pushed(self, index: int) -> bool:
        if index == 0:
            return False
        before, hop, wire = self._hops[index - 1], self._hops[index], self._current.hidden.dtype
        # What is pushed and what we keep must be the same numbers: our dtype must hold what the pusher sends.
        fits = before.dtype == wire or wire.itemsize > before.dtype.itemsize
        return fits and self._session.pushable(before, hop)

    def _push_to(self, index: int) -> pb.PushTo | None:
        following = index + 1
        return self._targets[following] if following < len(self._hops) and self._is_pushed(following) else None
