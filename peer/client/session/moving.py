"""A session leaves a server that keeps being slow while somebody else would be several times faster.

A tarpit says that it is the fastest and answers each step just before its deadline. It fails nobody, so nobody replaces
it. Here what it really took is compared with what the next best server would take.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import trio

from petals.peer.base.concurrency import gather
from petals.peer.client.hops.hop import Hop, StepOutput
from petals.peer.client.routing.local_blocks import is_home
from petals.protocols.errors import RemoteError, RouteError

if TYPE_CHECKING:
    from petals.peer.client.session.recovery import Recovery

log = logging.getLogger(__name__)

SLOW_S = 0.25
"""A step that takes less is not looked at."""
SLOW_FACTOR = 3.0
"""Slow is who takes so many times as long as the next best is expected to."""
SLOW_STEPS = 3
"""In a row, before its blocks move."""
MOVE_AGAIN_S = 30.0
"""Between two tries to move the same blocks."""


def note(recovery: Recovery, hop: Hop, output: StepOutput, rows: int, tokens: int) -> None:
    """A step has been answered: remember how long it took, and whether somebody else would have been faster."""
    if tokens != 1 or is_home(hop.peer_id):
        return
    recovery.watcher.note_step(hop.peer_id, len(hop.blocks) * rows, output.round_trip_s)
    if output.round_trip_s < SLOW_S:
        hop.slow_steps = 0
        return
    try:
        next_best = recovery.find_route(hop.blocks, frozenset({hop.peer_id}))
    except RouteError:
        return
    hop.slow_steps = hop.slow_steps + 1 if output.round_trip_s > SLOW_FACTOR * next_best.expected_s else 0


async def leave_slow(recovery: Recovery) -> None:
    """Move the blocks of hops that have been slow for long to others; where that fails, they stay."""
    for hop in [hop for hop in recovery.hops if hop.slow_steps >= SLOW_STEPS and trio.current_time() >= hop.move_at]:
        hop.slow_steps, hop.move_at = 0, trio.current_time() + MOVE_AGAIN_S
        try:
            moved = await _open_elsewhere(recovery, hop)
        except (RemoteError, RouteError) as error:
            log.info("blocks %d:%d stay at a slow server: %s", hop.blocks.start, hop.blocks.stop, error)
            continue
        log.warning(
            "blocks %d:%d move from …%s, which is several times slower than others",
            hop.blocks.start, hop.blocks.stop, hop.peer_id[-6:],
        )  # fmt: skip
        await recovery.put_in_place(hop, moved)
        await hop.close()


async def _open_elsewhere(recovery: Recovery, hop: Hop) -> list[Hop]:
    """Servers that hold the blocks of `hop` and know what it knows. Raises RemoteError, RouteError."""
    opened: list[Hop] = []

    async def open_one(leg: object) -> None:
        opened.append(await recovery.open_hop(leg))  # type: ignore[arg-type]

    try:
        legs = recovery.find_route(hop.blocks, frozenset({hop.peer_id})).hops
        for result in await gather([partial(open_one, leg) for leg in legs]):
            if isinstance(result, Exception):
                raise result
        opened.sort(key=lambda each: each.blocks.start)
        await recovery.rebuild(opened, hop)
    except BaseException:
        with trio.CancelScope(shield=True):
            await gather([each.reset for each in opened])
        raise
    return opened
