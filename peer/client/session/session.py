"""A session sends each step through the hops of its route, in one of three ways: from hop to hop through us, straight
from server to server (pushed_step.py), or a long prompt in pieces (pipelined_step.py). What happens when a hop fails is
recovery.py's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import trio
from torch import Tensor

from petals.peer.base.concurrency import gather
from petals.peer.base.config import Timeouts
from petals.peer.client.audit.audit import SessionAudit
from petals.peer.client.hops.hop import Hop, SessionSpec, StepInput, StepOutput, for_blocks
from petals.peer.client.hops.standby import Standbys
from petals.peer.client.routing.local_blocks import Home, is_home
from petals.peer.client.routing.routing import RouteChoice
from petals.peer.client.routing.view import SwarmWatcher
from petals.peer.client.session import moving
from petals.peer.client.session.pipelined_step import PIECE_TOKENS, PipelinedStep, is_long
from petals.peer.client.session.pushed_step import PushedStep
from petals.peer.client.session.recovery import FindRoute, Recovery, RecoveryOptions
from petals.peer.net.host import Host
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import (
    LocalProtocolError,
    RemoteError,
    RouteError,
    UserError,
)
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HopTrace:
    """Where one step's time went at one hop, in seconds."""

    peer_id: PeerId
    blocks: range
    round_trip_s: float
    queue_s: float
    compute_s: float
    sent_at: float = 0.0
    serialise_s: float = 0.0
    cipher_s: float = 0.0
    link: str = ""
    """"direct", "punched" or "relayed"; "" for this peer itself."""

    def parts(self) -> dict[str, float]:
        """The round trip taken apart; what is not accounted for otherwise is "network"."""
        known = {
            "serialise": self.serialise_s,
            "encrypt": self.cipher_s,
            "queue": self.queue_s,
            "compute": self.compute_s,
        }
        return {**known, "network": max(0.0, self.round_trip_s - sum(known.values()))}

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "peer_id": self.peer_id,
            "blocks": [self.blocks.start, self.blocks.stop],
            "round_trip_s": self.round_trip_s,
            "queue_s": self.queue_s,
            "compute_s": self.compute_s,
            "link": self.link,
        }


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One step of one session."""

    session: int
    """Tells sessions apart."""
    position: int
    tokens: int
    hops: tuple[HopTrace, ...]


class SessionBroken(LocalProtocolError):
    """A step was cut off half way; the session can not go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """How a session is run."""

    recovery: RecoveryOptions = field(default_factory=RecoveryOptions)
    push: bool = True
    """Let servers send to each other (pushed_step.py) where it pays."""
    push_pays: Callable[[PeerId, PeerId], bool] = lambda before, after: True
    """Whether it does for a pair of servers."""
    piece_tokens: int = PIECE_TOKENS
    """A step of more than twice as many, all rows together, flows through several hops in pieces of that size
    (pipelined_step.py); 0: it goes as a whole."""
    standby_in: trio.Nursery | None = None
    """Keep second servers ready (standby.py), fed by a task in this nursery; None: do not."""
    on_step: Callable[[StepTrace], None] | None = None
    """Called after every step with where its time went."""
    audit: Callable[[Callable[[int], None]], SessionAudit] | None = None
    """Picks answers to be checked (audit.py), in a task in `audit_in`; None: none are."""
    audit_in: trio.Nursery | None = None


class RemoteSession:
    """Caches for one batch over `blocks`, held by servers of the swarm.

    Which servers these are, and who takes the place of one that fails, is the business of `recovery`.
    """

    def __init__(
        self,
        host: Host | Home,
        watcher: SwarmWatcher,
        blocks: range,
        spec: SessionSpec,
        timeouts: Timeouts,
        find_route: FindRoute,
        options: SessionOptions,
    ) -> None:
        self.blocks = blocks
        self.spec = spec
        self.recovery = Recovery(
            host,
            watcher,
            spec,
            timeouts,
            find_route,
            options.recovery,
            with_standbys=options.standby_in is not None,
        )
        self.last_trace: tuple[HopTrace, ...] = ()
        self.choice: RouteChoice | None = None
        """Why this route, as of the opening."""
        self.watcher = watcher
        self._host = host
        self._options = options
        # Rounded twice, our copy would not be what was pushed.
        self._push = options.push and spec.encoding != pb.BLOCKWISE_INT8
        self.unpushable: set[tuple[PeerId, PeerId]] = set()
        """Pairs of servers between which a push did not come."""
        self._pushable: dict[tuple[PeerId, PeerId], bool] = {}
        self.audit = None if options.audit is None else options.audit(self.doubt)
        self.recovery.on_answer = None if self.audit is None else self.audit.note
        self._spent: dict[bytes, tuple[float, float]] = {}
        """Session id at a hop -> its seconds of serialising and of encryption as of the last step."""
        self._piece_tokens = options.piece_tokens
        self._position = 0
        self._row_order: Tensor | None = None
        self._broken = False

    @property
    def hops(self) -> list[Hop]:
        """In the order of their blocks."""
        return self.recovery.hops

    @property
    def failures(self) -> int:
        """Hops replaced so far."""
        return self.recovery.failures

    @property
    def standbys(self) -> Standbys | None:
        """Second servers, where they are kept ready."""
        return self.recovery.standbys

    @property
    def position(self) -> int:
        """Tokens per row in the caches."""
        return self._position

    async def open(self) -> None:
        """Find a route and lease cache room on every hop of it.

        Raises:
            MissingBlocks: somebody is missing, named, after `Timeouts.route_s`.
            RemoteError: nobody of those who hold a block would open a session.
        """
        self.recovery.hops = await self.recovery.open_hops(self.blocks)
        for hop in self.hops:
            hop.on_answer = self.recovery.on_answer
        self._position = self.recovery.adopted = min(hop.conversation.position for hop in self.hops)
        if len(self.hops) == 1:
            self._piece_tokens = 0  # for good, so that boundaries do not depend on later failures
        self._spent = {hop.session_id: (hop.serialise_s, hop.messages.cipher_s) for hop in self.hops}
        if self.standbys is not None and self._options.standby_in is not None:
            self._options.standby_in.start_soon(self.standbys.run)
        if self.audit is not None and self._options.audit_in is not None:
            self._options.audit_in.start_soon(self.audit.run)

    def doubt(self, block: int) -> None:
        """What came out of this block, at whatever step, was wrong: the next step begins with computing it again."""
        known = self.recovery.doubtful
        self.recovery.doubtful = block if known is None else min(block, known)

    def rollback(self, position: int) -> None:
        """Forget everything from `position` on; the servers learn of it with the next step."""
        if not 0 <= position <= self._position:
            raise ValueError(f"position {position} is not within the {self._position} tokens of this session")
        if position < self._position:
            orders = [hop.truncate(position) for hop in self.hops]
            if self.standbys is not None:
                self.standbys.rollback(position)
            # What was dropped first was done last.
            self._row_order = _compose(orders[0] if orders else None, self._row_order)
            self.recovery.adopted = min(self.recovery.adopted, position)
        self._position = position

    async def step(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None = None,
        prompts: Tensor | None = None,
        hypo_ids: Tensor | None = None,
    ) -> Tensor:
        """One step through all hops; shapes as in `ChainSession.step`, CPU tensors.

        Raises:
            MissingBlocks, RemoteError: no hop could be replaced; the session is broken then.
        """
        if self._broken:
            raise SessionBroken("an earlier step of this session was cut off; open a new one")
        if hidden.shape[0] != self.spec.batch_size:  # no server could accept it
            raise UserError(f"hidden has {hidden.shape[0]} rows, the session {self.spec.batch_size}: open another one")
        if self._position + hidden.shape[1] > self.spec.max_length:
            raise RouteError(
                f"{self._position} + {hidden.shape[1]} tokens are more than this session's max_length of "
                f"{self.spec.max_length}"
            )
        self._broken = True
        if self._row_order is None:  # else the caches' rows are in an order that no history has; this step mends that
            await self.recovery.take_better_ways()
            await moving.leave_slow(self.recovery)
        done: list[tuple[Hop, StepOutput]] = []
        current = StepInput(
            position=self._position,
            hidden=hidden,
            attention_mask=attention_mask,
            prompts=prompts,
            hypo_ids=hypo_ids,
        )
        replay_order = _compose(self._row_order, hypo_ids)
        for hop in self.hops:
            if hop.peer_id in self.watcher.liars:  # caught by another session, as it may be
                self.doubt(hop.blocks.start)
        healed = self.recovery.doubtful is not None
        if healed:
            await self.recovery.heal()
        if self._piece_tokens and is_long(current, self._piece_tokens):
            pipelined = PipelinedStep(self, current, replay_order, self._piece_tokens)
            output = await pipelined.run()
            done = pipelined.done
        elif self._push and not healed and any(self.pushable(*pair) for pair in pairwise(self.hops)):
            pushed = PushedStep(self, current, replay_order)
            output, done = await pushed.run(), pushed.done
        else:
            output = await self._relay(self.blocks, current, replay_order, done)
        self._position += hidden.shape[1]
        self._row_order = None
        for hop in self.hops:
            hop.rebuilt = False
        if self.standbys is not None:
            self.standbys.tell()
        self._broken = False
        done.sort(key=lambda each: each[0].blocks.start)
        for hop, answer in done:
            moving.note(self.recovery, hop, answer, *hidden.shape[:2])
        self.last_trace = tuple(self._trace(hop, answer) for hop, answer in done)
        if self._options.on_step is not None:
            self._options.on_step(StepTrace(id(self), current.position, hidden.shape[1], self.last_trace))
        return output

    def _trace(self, hop: Hop, output: StepOutput) -> HopTrace:
        before = self._spent.get(hop.session_id, (0.0, 0.0))
        spent = self._spent[hop.session_id] = (hop.serialise_s, hop.messages.cipher_s)
        return HopTrace(
            hop.peer_id,
            hop.blocks,
            output.round_trip_s,
            output.queue_s,
            output.compute_s,
            sent_at=output.sent_at,
            serialise_s=spent[0] - before[0],
            cipher_s=spent[1] - before[1],
            link=self._host.link(hop.peer_id),
        )

    async def redo(
        self,
        lost: Hop,
        error: RemoteError,
        current: StepInput,
        replay_order: Tensor | None,
        done: list[tuple[Hop, StepOutput]],
    ) -> Tensor:
        """The output of the blocks of `lost`, which failed, for `current`, their input: by who replaces it.

        Raises: as `step`.
        """
        await self.recovery.replace(lost, error, failures=1)
        return await self._relay(lost.blocks, current, replay_order, done)

    def pushable(self, before: Hop, after: Hop) -> bool:
        """Whether a step goes straight from one of our hops to the next, as far as we know."""
        pair = before.peer_id, after.peer_id
        if pair in self.unpushable or any(map(is_home, pair)):
            return False
        if pair not in self._pushable:
            self._pushable[pair] = self._options.push_pays(*pair)
        return self._pushable[pair]

    async def _relay(
        self,
        blocks: range,
        current: StepInput,
        replay_order: Tensor | None,
        done: list[tuple[Hop, StepOutput]],
    ) -> Tensor:
        """`current` through the hops of `blocks`, one after another, each answering us."""
        hidden, dtype, position, failures = current.hidden, current.hidden.dtype, blocks.start, 0
        while position < blocks.stop:
            hop = next(hop for hop in self.hops if hop.blocks.start == position)
            told = for_blocks(current, self.blocks, hop.blocks)
            remembered = replace(told, hypo_ids=replay_order) if replay_order is not current.hypo_ids else told
            try:
                output = await hop.step(remembered if hop.rebuilt else told, replayed_as=remembered)
            except RemoteError as error:
                failures += 1
                await self.recovery.replace(hop, error, failures)
                continue
            done.append((hop, output))
            assert output.hidden is not None
            hidden = output.hidden if output.hidden.dtype is dtype else output.hidden.to(dtype)
            position = hop.blocks.stop
            if position < blocks.stop:
                current = replace(current, hidden=hidden)
        return hidden

    async def close(self, prefixes: Sequence[bytes] = ()) -> None:
        """Give every lease back; never raises, bounded.

        Args:
            prefixes: names of what the caches hold, which the servers may keep for a later session.
        """
        self._end()
        hops, self.recovery.hops = self.hops, []
        with trio.CancelScope(shield=True):  # each close is bounded by itself
            await gather([partial(hop.close, prefixes) for hop in hops])

    async def reset(self) -> None:
        """Give every lease back at once, after a cancellation."""
        self._end()
        hops, self.recovery.hops = self.hops, []
        with trio.CancelScope(shield=True):
            await gather([hop.reset for hop in hops])

    def _end(self) -> None:
        self._broken = True
        if self.standbys is not None:
            self.standbys.close()
        if self.audit is not None:
            self.audit.end()


def _compose(first: Tensor | None, then: Tensor | None) -> Tensor | None:
    """The row order of doing `first`, then `then`."""
    if first is None or then is None:
        return then if first is None else first
    return torch.index_select(first, 0, then)
