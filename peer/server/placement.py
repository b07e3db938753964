"""Which blocks a server should hold, and when moving pays. Pure: what the swarm says in, a range out.

Theory. A server that passes `rps` blocks per second and holds n of them can serve each at `rps / n` steps per second. A
block's supply is the sum over its holders, and a swarm is as fast as its weakest block. "The weakest" is a poor guide
for single moves, though: where two stretches are equally weak, strengthening one of them changes nothing. So everybody
lowers one and the same *strain*, the sum over blocks of (fair supply / supply)^16, which the weakest blocks dominate
and which each improvement lowers; blocks nobody holds come first of all. Since a move must fill a hole or lower the
strain by a clear margin, and neither can go on for ever, servers that move one after another come to rest.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from petals.dht.records import ServerRecord, ServerState
from petals.protocols.types import PeerId

POWER = 16
MIN_GAIN = 0.05
"""A move costs a reload and a drain: the strain must fall by this share of itself.

Both simulated (2026-11-23) on storms over 40 servers and 32 blocks, a third replaced at once. Speed as a share of all
work spread evenly, where simulated annealing with free moves reaches 0.92; moves per storm:
power 4, gain 0.02: 0.83, 2 moves; 8, 0.02: 0.87, 4; 16, 0.1: 0.85, 5; 16, 0.05: 0.87, 7; 16, 0.02: 0.89, 12."""


MEMORY_SHARE = 0.9
"""Of the memory that is free: the rest is for the library's own short needs."""


def blocks_that_fit(free_bytes: int, block_bytes: int, cache_bytes: int, workspace_bytes: int) -> int:
    """How many blocks a machine can hold beside its KV budget and the room one step computes in; may be 0 or less."""
    return int((free_bytes * MEMORY_SHARE - cache_bytes - workspace_bytes) // block_bytes)


UNKNOWN_RPS = 1.0
"""Of a server, where nobody has measured anything."""


def supply(records: Iterable[ServerRecord], num_blocks: int) -> list[float]:
    """Steps per second that the swarm can give each block."""
    totals = [0.0] * num_blocks
    # Who leaves is not counted on; who still loads, and has not measured, is taken for an average server.
    staying = [record for record in records if record.state in (ServerState.JOINING, ServerState.ONLINE)]
    speeds = [record.inference_rps for record in staying if record.inference_rps > 0]
    average = statistics.mean(speeds) if speeds else UNKNOWN_RPS
    for record in staying:
        each = (record.inference_rps or average) / len(record.blocks)
        for block in record.blocks:
            if block < num_blocks:
                totals[block] += each
    return totals


def choose_blocks(records: Iterable[ServerRecord], num_blocks: int, capacity: int, rps: float) -> range:
    """The stretch of `capacity` blocks where a newcomer helps most; the first of equals.

    Args:
        records: the servers that are there, without the newcomer.
        num_blocks: of the whole model. capacity: how many the newcomer can hold, at least 1.
        rps: blocks it passes per second.
    """
    return _choose(supply(records, num_blocks), min(capacity, num_blocks), rps)


def should_move(
    records: Sequence[ServerRecord], me: PeerId, num_blocks: int, capacity: int, *, min_gain: float = MIN_GAIN
) -> range | None:
    """Where `me` should move to; None: stay.

    Call it at times of one's own choosing (a random pause after each lookup) and with a fresh lookup: servers that move
    at the same moment would all run to the same place.

    Args:
        records: everybody's, `me` included.
        capacity: how many blocks `me` can hold.
    """
    mine = next((record for record in records if record.peer_id == me), None)
    if mine is None:
        return None
    rps = mine.inference_rps or UNKNOWN_RPS
    others = supply((record for record in records if record.peer_id != me), num_blocks)
    fair = _fair(others, rps)
    place = _choose(others, min(capacity, num_blocks), rps)
    now = _with(others, mine.blocks, rps)
    then = _with(others, place, rps)
    if _holes(then) != _holes(now):
        return place if len(_holes(then)) < len(_holes(now)) else None  # never leave what nobody else holds
    return place if _strain(then, fair) <= (1 - min_gain) * _strain(now, fair) else None


def may_leave(records: Iterable[ServerRecord], me: PeerId, blocks: range) -> bool:
    """Whether each of `blocks` is held by somebody else who answers and stays.

    Ask again once `me` has been announced as draining: of two who want to leave the same blocks, whoever looks last
    sees the other one go.
    """
    staying = {
        block
        for record in records
        if record.peer_id != me and record.state is ServerState.ONLINE
        for block in record.blocks
    }
    return all(block in staying for block in blocks)


def _choose(others: list[float], capacity: int, rps: float) -> range:
    fair = _fair(others, rps)
    relief = [_block_strain(total, fair) - _block_strain(total + rps / capacity, fair) for total in others]
    best, best_start = (-1, 0.0), 0
    for start in range(len(others) - capacity + 1):
        here = range(start, start + capacity)
        gain = (sum(others[block] <= 0 for block in here), sum(relief[block] for block in here if others[block] > 0))
        if (gain[0], gain[1] * (1 - 1e-9)) > best:  # the same sum in another order differs in the last digits
            best, best_start = gain, start
    return range(best_start, best_start + capacity)


def _with(others: list[float], blocks: range, rps: float) -> list[float]:
    return [total + rps / len(blocks) if block in blocks else total for block, total in enumerate(others)]


def _fair(others: list[float], rps: float) -> float:
    """What each block would get if all were served alike: an upper bound of any swarm's speed."""
    return (sum(others) + rps) / len(others)


def _holes(totals: list[float]) -> set[int]:
    return {block for block, total in enumerate(totals) if total <= 0}


def _strain(totals: list[float], fair: float) -> float:
    return sum(_block_strain(total, fair) for total in totals)


def _block_strain(total: float, fair: float) -> float:
    return (fair / total) ** POWER if total > 0 else 0.0  # holes are counted, not weighed
