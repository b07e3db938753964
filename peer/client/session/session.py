"""A session walks a route step by step, keeps what it told each hop, and replaces a hop that fails.

Exactness: every hop's cache is a function of the inputs it was told, in order. So a replacement that is told the same
inputs with the same step boundaries computes the same cache, bit for bit on the same kind of machine, and generation
goes on as if nothing had happened. Only the blocks of the hop that failed are routed again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
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
from petals.peer.client.hops.replay import as_one_prompt, in_chunks
from petals.peer.client.hops.standby import Standbys
from petals.peer.client.routing.local_blocks import Home, is_home
from petals.peer.client.routing.routing import Route, RouteChoice, RouteHop
from petals.peer.client.routing.view import SwarmWatcher
from petals.peer.client.session import moving
from petals.peer.client.session.pipelined_step import PIECE_TOKENS, PipelinedStep, is_long
from petals.peer.client.session.pushed_step import PushedStep
from petals.peer.net.host import Host
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import (
    Forbidden,
    LocalProtocolError,
    NeverFits,
    RemoteError,
    RouteError,
    UserError,
    WrongAnswer,
)
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

MOVE_AGAIN_S = 30.0
"""A server that had no room for a second session while one moves is asked again after this long."""


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


class RemoteSession:
    """Caches for one batch over `blocks`, held by servers of the swarm.

    Args:
        find_route: (blocks, peers to avoid) -> Route, or MissingBlocks.
        max_retries: how many failures in a row one step may survive.
        exact_recovery: tell replacements the history with its own step boundaries, so that even logits are the same to
            the last bit; else as one prompt, which is faster and the same up to rounding.
        push: let servers send to each other (pushed_step.py) where it pays.
        push_pays: whether it does for a pair of servers.
        piece_tokens: a step of more than twice as many, all rows together, flows through several hops in pieces of that
            size (pipelined_step.py); 0: goes as a whole.
        prefix_inputs: (block, tokens) -> the hidden states of the first tokens of the sequence that enter a block;
            needed when a hop is lost whose cache began with what an earlier session left there (`spec.prefixes`).
        standby_in: keep second servers ready (standby.py), fed by a task in this nursery; None: do not.
        on_step: told of every step where its time went.
        audit: picks answers to be checked (audit.py), in a task in `audit_in`; None: none are.
    """

    def __init__(
        self,
        host: Host | Home,
        watcher: SwarmWatcher,
        blocks: range,
        spec: SessionSpec,
        timeouts: Timeouts,
        find_route: Callable[[range, frozenset[PeerId]], Route],
        *,
        max_retries: float = 10,
        exact_recovery: bool = True,
        push: bool = True,
        push_pays: Callable[[PeerId, PeerId], bool] = lambda before, after: True,
        piece_tokens: int = PIECE_TOKENS,
        prefix_inputs: Callable[[int, int], Awaitable[Tensor]] | None = None,
        standby_in: trio.Nursery | None = None,
        on_step: Callable[[StepTrace], None] | None = None,
        audit: Callable[[Callable[[int], None]], SessionAudit] | None = None,
        audit_in: trio.Nursery | None = None,
    ) -> None:
        self.blocks = blocks
        self.spec = spec
        self.hops: list[Hop] = []
        self.failures = 0
        """Hops replaced so far."""
        self.last_trace: tuple[HopTrace, ...] = ()
        self.choice: RouteChoice | None = None
        """Why this route, as of the opening."""
        self._host = host
        self.watcher = watcher
        self._timeouts = timeouts
        self.find_route = find_route
        self._max_retries = max_retries
        self._exact_recovery = exact_recovery
        self._push = push and spec.encoding != pb.BLOCKWISE_INT8  # rounded twice, our copy would not be what was pushed
        self.unpushable: set[tuple[PeerId, PeerId]] = set()
        """Pairs of servers between which a push did not come."""
        self._push_pays = push_pays
        self._pushable: dict[tuple[PeerId, PeerId], bool] = {}
        self.standbys = None if standby_in is None else Standbys(self._foreign_hops, self._open_standby)
        self._standby_in = standby_in
        self._on_step = on_step
        self.audit = None if audit is None else audit(self.doubt)
        self._audit_in = audit_in
        self._on_answer = None if self.audit is None else self.audit.note
        self._doubtful: int | None = None
        """From this block on everything has to be computed again."""
        self._spent: dict[bytes, tuple[float, float]] = {}
        """Session id at a hop -> its seconds of serialising and of encryption as of the last step."""
        self._piece_tokens = piece_tokens
        self._position = 0
        self._prefix_inputs = prefix_inputs
        self._adopted = 0
        """Tokens that the servers held when the session was opened; no hop's history has them."""
        self._row_order: Tensor | None = None
        self._broken = False

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
        self.hops = await self._open_hops(self.blocks)
        for hop in self.hops:
            hop.on_answer = self._on_answer
        self._position = self._adopted = min(hop.conversation.position for hop in self.hops)
        if len(self.hops) == 1:
            self._piece_tokens = 0  # for good, so that boundaries do not depend on later failures
        self._spent = {hop.session_id: (hop.serialise_s, hop.messages.cipher_s) for hop in self.hops}
        if self.standbys is not None and self._standby_in is not None:
            self._standby_in.start_soon(self.standbys.run)
        if self.audit is not None and self._audit_in is not None:
            self._audit_in.start_soon(self.audit.run)

    def doubt(self, block: int) -> None:
        """What came out of this block, at whatever step, was wrong: the next step begins with computing it again."""
        self._doubtful = block if self._doubtful is None else min(block, self._doubtful)

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
            self._adopted = min(self._adopted, position)
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
        await self._take_better_ways()
        if self._row_order is None:
            await moving.leave_slow(self)
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
        healed = self._doubtful is not None
        if healed:
            await self._heal()
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
            moving.note(self, hop, answer, *hidden.shape[:2])
        self.last_trace = tuple(self._trace(hop, answer) for hop, answer in done)
        if self._on_step is not None:
            self._on_step(StepTrace(id(self), current.position, hidden.shape[1], self.last_trace))
        return output

    async def _take_better_ways(self) -> None:
        """Go on over a direct connection where a session began over a relay, at the same server."""
        if self._row_order is not None:
            return  # the old caches' rows are in an order that no history has; the next step puts them right
        for index, hop in enumerate(self.hops):
            if trio.current_time() < hop.move_at or not self._host.has_better_way(hop.messages.stream):
                continue
            moved: Hop | None = None
            try:
                moved = await Hop.open(self._host, hop.peer_id, hop.addrs, hop.blocks, self.spec, self._timeouts)
                await self._rebuild([moved], hop, want_outputs=False)
            except RemoteError as error:  # it may have no room for two; the old way still works
                log.info("blocks %d:%d stay with their relay: %s", hop.blocks.start, hop.blocks.stop, error)
                hop.move_at = trio.current_time() + MOVE_AGAIN_S
                if moved is not None:
                    await moved.reset()
                continue
            except BaseException:
                if moved is not None:
                    await moved.reset()
                raise
            self.hops[index] = moved
            await hop.close()
            if self.standbys is not None:
                await self.standbys.forget(hop)

    def _foreign_hops(self) -> list[Hop]:
        return [hop for hop in self.hops if not is_home(hop.peer_id)]

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
        await self.replace(lost, error, failures=1)
        return await self._relay(lost.blocks, current, replay_order, done)

    def pushable(self, before: Hop, after: Hop) -> bool:
        """Whether a step goes straight from one of our hops to the next, as far as we know."""
        pair = before.peer_id, after.peer_id
        if pair in self.unpushable or any(map(is_home, pair)):
            return False
        if pair not in self._pushable:
            self._pushable[pair] = self._push_pays(*pair)
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
                await self.replace(hop, error, failures)
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
        hops, self.hops = self.hops, []
        with trio.CancelScope(shield=True):  # each close is bounded by itself
            await gather([partial(hop.close, prefixes) for hop in hops])

    async def reset(self) -> None:
        """Give every lease back at once, after a cancellation."""
        self._end()
        hops, self.hops = self.hops, []
        with trio.CancelScope(shield=True):
            await gather([hop.reset for hop in hops])

    def _end(self) -> None:
        self._broken = True
        if self.standbys is not None:
            self.standbys.close()
        if self.audit is not None:
            self.audit.end()

    async def _heal(self) -> None:
        """Compute again what may come of a lie: caches of the liar's blocks are built elsewhere from what it was told,
        which was right, and those behind them from what comes out there now."""
        while self._doubtful is not None:
            begin, self._doubtful = self._doubtful, None
            if self.standbys is not None:
                self.standbys.rollback(0)
            concerned = [hop for hop in self.hops if hop.blocks.stop > begin]
            if len({tuple(step.position for step in hop.history) for hop in concerned}) > 1:
                for hop in concerned:  # one of them was told in fewer steps
                    hop.history = as_one_prompt(hop.history)
            outputs: list[Tensor] = []
            for hop in concerned:
                steps = hop.history
                if hop is not concerned[0]:
                    steps = [replace(s, hidden=o.to(s.hidden.dtype)) for s, o in zip(steps, outputs, strict=True)]
                outputs = await self._retell(hop, steps, want_outputs=hop is not concerned[-1])

    async def _retell(self, hop: Hop, steps: list[StepInput], *, want_outputs: bool) -> list[Tensor]:
        """Let the cache of a hop's blocks be what comes of `steps`: there, or elsewhere if it lies or fails."""
        hop.history = steps
        try:
            if hop.peer_id in self.watcher.liars:
                raise WrongAnswer(f"peer …{hop.peer_id[-6:]} has lied", hop.peer_id)
            hop.history = []
            outputs = await hop.replay(steps, want_outputs=want_outputs)
            hop.rebuilt = True
            return outputs
        except RemoteError as error:
            hop.history = steps
            return await self.replace(hop, error, 1, want_outputs=want_outputs)

    async def replace(
        self, lost: Hop, error: RemoteError, failures: int, *, want_outputs: bool = False
    ) -> list[Tensor]:
        """Put other servers in the place of a hop and bring their caches to where it was.

        Returns: the outputs of the steps of its history, if `want_outputs`.
        """
        await lost.reset()
        while True:
            self.watcher.report(lost.peer_id if error.peer_id is None else error.peer_id, error)
            if failures > self._max_retries:
                raise error
            log.warning("lost blocks %d:%d: %s; looking for a replacement", lost.blocks.start, lost.blocks.stop, error)
            self.failures += 1
            hops: list[Hop] = []
            outputs: list[Tensor] = []
            try:
                standby = None if self.standbys is None or want_outputs else await self.standbys.take(lost)
                if standby is not None and standby.peer_id in self.watcher.liars:
                    await standby.reset()
                    standby = None
                if standby is not None:
                    hops = [standby]
                else:
                    hops = await self._open_hops(lost.blocks, avoid=frozenset({lost.peer_id}))
                    outputs = await self._rebuild(hops, lost, want_outputs=want_outputs)
            except RemoteError as another:
                error, failures = another, failures + 1
                await gather([hop.reset for hop in hops])
                continue
            except BaseException:
                with trio.CancelScope(shield=True):
                    await gather([hop.reset for hop in hops])
                raise
            self._put(lost, hops)
            return outputs

    def _put(self, lost: Hop, hops: Sequence[Hop]) -> None:
        index = self.hops.index(lost)
        self.hops[index : index + 1] = hops
        for hop in hops:
            hop.rebuilt = True
            hop.on_answer = self._on_answer

    async def open_hop(self, leg: RouteHop) -> Hop:
        """A session at one server. Raises RemoteError."""
        return await Hop.open(self._host, leg.peer_id, leg.addrs, leg.blocks, self.spec, self._timeouts)

    async def rebuild(self, hops: list[Hop], like: Hop) -> None:
        """Bring the caches of `hops` to where that of `like` is. Raises RemoteError."""
        await self._rebuild(hops, like, want_outputs=False)

    async def put_in_place(self, left: Hop, hops: Sequence[Hop]) -> None:
        """From the next step on `hops` compute the blocks of `left`."""
        self._put(left, hops)
        if self.standbys is not None:
            await self.standbys.forget(left)

    async def _rebuild(self, hops: list[Hop], lost: Hop, *, want_outputs: bool) -> list[Tensor]:
        history = [*await self._unseen(lost, hops), *lost.history]
        if not self._exact_recovery and not want_outputs:  # whose boundaries must be those of the steps
            history = as_one_prompt(history)
        if not history:
            return []
        outputs: list[Tensor] = []
        for hop in hops:
            last = hop is hops[-1]
            told = [for_blocks(step, lost.blocks, hop.blocks) for step in history]
            outputs = await hop.replay(told, want_outputs=want_outputs or not last)
            if not last:
                history = [
                    replace(step, hidden=output.to(step.hidden.dtype))
                    for step, output in zip(history, outputs, strict=True)
                ]
        return outputs

    async def _unseen(self, lost: Hop, hops: Sequence[Hop]) -> list[StepInput]:
        """What `lost` knew without having been told by this session, as far as not all of `hops` know it too."""
        knows_all = bool(lost.history) and lost.history[0].position == 0
        if knows_all or all(hop.conversation.position >= self._adopted for hop in hops):
            return []
        assert self._prefix_inputs is not None
        hidden = await self._prefix_inputs(lost.blocks.start, self._adopted)
        return in_chunks(StepInput(position=0, hidden=hidden))

    async def _open_standby(self, hop: Hop, avoid: frozenset[PeerId]) -> Hop:
        route = self.find_route(hop.blocks, avoid)
        if len(route.hops) != 1:
            raise RouteError(f"nobody else holds all of {hop.blocks.start}:{hop.blocks.stop}")
        leg = route.hops[0]
        standby = await Hop.open(self._host, leg.peer_id, leg.addrs, leg.blocks, self.spec, self._timeouts)
        try:
            await standby.replay(await self._unseen(hop, [standby]), want_outputs=False)
        except BaseException:
            await standby.reset()
            raise
        standby.history.clear()  # to be compared with that of `hop`, which was not told either
        return standby

    async def _open_hops(self, blocks: range, avoid: frozenset[PeerId] = frozenset()) -> list[Hop]:
        """Sessions at servers that hold `blocks` together. Whoever refuses is avoided, until nobody is left."""
        deadline = trio.current_time() + self._timeouts.route_s
        refusal: RemoteError | None = None
        final: dict[PeerId, RemoteError] = {}
        """Refusals that waiting does not change."""
        while True:
            try:
                route = self.find_route(blocks, avoid)
            except RouteError:
                if final and avoid <= final.keys():  # nobody else has them
                    raise next(iter(final.values())) from None
                if avoid:
                    avoid = frozenset(final)  # rather somebody who failed before than nobody
                    if refusal is None:
                        continue
                if trio.current_time() >= deadline:
                    if refusal is not None:
                        raise refusal from None
                    raise
                await self.watcher.changed(min(1.0, max(0.0, deadline - trio.current_time())))
                continue
            leases: list[Hop] = []

            async def lease(leg: RouteHop, leases: list[Hop] = leases) -> Hop:
                hop = await Hop.open(self._host, leg.peer_id, leg.addrs, leg.blocks, self.spec, self._timeouts)
                leases.append(hop)
                return hop

            try:
                results = await gather([partial(lease, leg) for leg in route.hops])
            except BaseException:  # cut off while one still opens: the others have given us their room already
                with trio.CancelScope(shield=True):
                    await gather([hop.reset for hop in leases])
                raise
            opened = [result for result in results if isinstance(result, Hop)]
            if len(opened) == len(results):
                return opened
            await gather([hop.reset for hop in opened])
            for leg, result in zip(route.hops, results, strict=True):
                if isinstance(result, RemoteError):
                    self.watcher.report(leg.peer_id, result)
                    avoid |= {leg.peer_id}
                    refusal = result
                    if isinstance(result, Forbidden | NeverFits):
                        final[leg.peer_id] = result
                elif not isinstance(result, Hop):
                    raise result
            if trio.current_time() >= deadline and refusal is not None:
                raise refusal


def _compose(first: Tensor | None, then: Tensor | None) -> Tensor | None:
    """The row order of doing `first`, then `then`."""
    if first is None or then is None:
        return then if first is None else first
    return torch.index_select(first, 0, then)
