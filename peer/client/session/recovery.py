"""How a session gets its hops, and how one that fails, lies or is far away is replaced.

Exactness. Every hop's cache is a function of the inputs it was sent, in order. A replacement that is sent the same
inputs with the same step boundaries multiplies matrices of the same shapes, so it computes the same cache, bit for bit
on the same kind of machine, and generation continues as if nothing had happened. Only the blocks of the hop that failed
are routed again; the hops before it have their caches still, the hops behind it see the same inputs as before.

What a replacement must be sent is the hop's own history (hop.py). Four things are not in it:

- what an earlier session had left in the cache (`adopted` tokens): computed again from the prompt;
- rows that a beam search reordered: the caller passes the order with the next step;
- steps that were rolled back: the history was cut, so they are not sent at all;
- what came from a server that lied: everything behind the lie is computed again (`heal`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import trio
from torch import Tensor

from petals.peer.base.concurrency import gather
from petals.peer.base.config import Timeouts
from petals.peer.client.hops.hop import Hop, SessionSpec, StepInput, for_blocks
from petals.peer.client.hops.replay import as_one_prompt, in_chunks
from petals.peer.client.hops.standby import Standbys
from petals.peer.client.routing.local_blocks import Home, is_home
from petals.peer.client.routing.routing import Route, RouteHop
from petals.peer.client.routing.view import SwarmWatcher
from petals.peer.net.host import Host
from petals.protocols.errors import Forbidden, NeverFits, RemoteError, RouteError, WrongAnswer
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

MOVE_AGAIN_S = 30.0
"""A server that had no room for a second session while one moves is asked again after this long."""

FindRoute = Callable[[range, frozenset[PeerId]], Route]
"""(blocks, peers to avoid) -> Route, or MissingBlocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryOptions:
    """How a session survives failures."""

    max_retries: float = 10
    """How many failures in a row one step may survive."""
    exact: bool = True
    """Send replacements the history with its own step boundaries, so that even logits are the same to the last bit;
    else as one prompt, which is faster and the same up to rounding."""
    prefix_inputs: Callable[[int, int], Awaitable[Tensor]] | None = None
    """(block, tokens) -> the hidden states of the first tokens of the sequence that enter a block; needed when a hop is
    lost whose cache began with what an earlier session left there."""


class Recovery:
    """The hops of one session, in the order of their blocks.

    Args:
        spec: what is asked of every hop.
        with_standbys: keep second servers ready (standby.py).
    """

    def __init__(
        self,
        host: Host | Home,
        watcher: SwarmWatcher,
        spec: SessionSpec,
        timeouts: Timeouts,
        find_route: FindRoute,
        options: RecoveryOptions,
        *,
        with_standbys: bool,
    ) -> None:
        self.hops: list[Hop] = []
        self.failures = 0
        """Hops replaced so far."""
        self.adopted = 0
        """Tokens that the servers held when the session was opened; no hop's history has them."""
        self.doubtful: int | None = None
        """From this block on everything has to be computed again."""
        self.find_route = find_route
        self.on_answer: Callable[..., None] | None = None
        self.standbys = Standbys(self._foreign_hops, self._open_standby) if with_standbys else None
        self.watcher = watcher
        self._host = host
        self._spec = spec
        self._timeouts = timeouts
        self._options = options

    async def open_hops(self, blocks: range, avoid: frozenset[PeerId] = frozenset()) -> list[Hop]:
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
                hop = await Hop.open(self._host, leg.peer_id, leg.addrs, leg.blocks, self._spec, self._timeouts)
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

    async def open_hop(self, leg: RouteHop) -> Hop:
        """A session at one server. Raises RemoteError."""
        return await Hop.open(self._host, leg.peer_id, leg.addrs, leg.blocks, self._spec, self._timeouts)

    async def replace(
        self, lost: Hop, error: RemoteError, failures: int, *, want_outputs: bool = False
    ) -> list[Tensor]:
        """Put other servers in the place of a hop and bring their caches to where it was.

        Returns: the outputs of the steps of its history, if `want_outputs`.
        """
        await lost.reset()
        while True:
            self.watcher.report(lost.peer_id if error.peer_id is None else error.peer_id, error)
            if failures > self._options.max_retries:
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
                    hops = await self.open_hops(lost.blocks, avoid=frozenset({lost.peer_id}))
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
            hop.on_answer = self.on_answer

    async def put_in_place(self, left: Hop, hops: Sequence[Hop]) -> None:
        """From the next step on `hops` compute the blocks of `left`."""
        self._put(left, hops)
        if self.standbys is not None:
            await self.standbys.forget(left)

    async def rebuild(self, hops: list[Hop], like: Hop) -> None:
        """Bring the caches of `hops` to where that of `like` is. Raises RemoteError."""
        await self._rebuild(hops, like, want_outputs=False)

    async def _rebuild(self, hops: list[Hop], lost: Hop, *, want_outputs: bool) -> list[Tensor]:
        history = [*await self._unseen(lost, hops), *lost.history]
        if not self._options.exact and not want_outputs:  # whose boundaries must be those of the steps
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
        if knows_all or all(hop.conversation.position >= self.adopted for hop in hops):
            return []
        assert self._options.prefix_inputs is not None
        hidden = await self._options.prefix_inputs(lost.blocks.start, self.adopted)
        return in_chunks(StepInput(position=0, hidden=hidden))

    async def heal(self) -> None:
        """Compute again what may come of a lie: caches of the liar's blocks are built elsewhere from what it was told,
        which was right, and those behind them from what comes out there now."""
        while self.doubtful is not None:
            begin, self.doubtful = self.doubtful, None
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

    async def take_better_ways(self) -> None:
        """Go on over a direct connection where a session began over a relay, at the same server."""
        for index, hop in enumerate(self.hops):
            if trio.current_time() < hop.move_at or not self._host.has_better_way(hop.messages.stream):
                continue
            moved: Hop | None = None
            try:
                moved = await Hop.open(self._host, hop.peer_id, hop.addrs, hop.blocks, self._spec, self._timeouts)
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

    async def _open_standby(self, hop: Hop, avoid: frozenset[PeerId]) -> Hop:
        route = self.find_route(hop.blocks, avoid)
        if len(route.hops) != 1:
            raise RouteError(f"nobody else holds all of {hop.blocks.start}:{hop.blocks.stop}")
        leg = route.hops[0]
        standby = await Hop.open(self._host, leg.peer_id, leg.addrs, leg.blocks, self._spec, self._timeouts)
        try:
            await standby.replay(await self._unseen(hop, [standby]), want_outputs=False)
        except BaseException:
            await standby.reset()
            raise
        standby.history.clear()  # to be compared with that of `hop`, which was not told either
        return standby
