"""Which servers a request goes through. Pure: a frozen view in, a route out; the dice are passed in.

Theory. Every hop answers the client, so the time of a step is the sum over hops of one round trip, the queue and the
compute time of its blocks. That sum is separable, and the best route is a shortest path over block boundaries: let
`run[s]` be the best time of being at boundary b inside server s; going on costs its seconds per block, changing to s
costs its fixed part once more. One pass over the blocks with all servers in hand, blocks x servers steps in all.

For training the same path is searched with every server's cost multiplied by its own throw of an exponential die: fast
servers win most often, everybody wins sometimes, so that load spreads in proportion to speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from petals.dht.records import ServerRecord
from petals.protocols.errors import MissingBlocks
from petals.protocols.types import PeerId

if TYPE_CHECKING:
    from petals.peer.client.view import Offer, SwarmView

UNKNOWN_ROUND_TRIP_S = 0.15
UNKNOWN_RPS = 300.0
RELAY_FACTOR = 2.0
"""A relay carries every byte twice."""
NO_ROOM_S = 10.0
"""Penalty for a server whose cache is said to be too full: tried last, for its record may be old."""
BANNED_S = 1000.0
"""Penalty for a banned server, plus what is left of its ban: tried when nobody else is there."""


@dataclass(frozen=True, slots=True)
class RouteHop:
    """One server of a route, and where its time is expected to go, in seconds."""

    peer_id: PeerId
    addrs: tuple[str, ...]
    blocks: range
    network_s: float
    queue_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class Route:
    """Servers that hold all blocks asked for, in order."""

    hops: tuple[RouteHop, ...]

    @property
    def expected_s(self) -> float:
        """One step through all of it."""
        return sum(hop.network_s + hop.queue_s + hop.compute_s for hop in self.hops)

    def describe(self) -> str:
        """For people: "0:12 via …abcdef (3.1 ms) => 12:24 via …"."""
        return " => ".join(
            f"{hop.blocks.start}:{hop.blocks.stop} via …{hop.peer_id[-6:]} "
            f"({1e3 * (hop.network_s + hop.queue_s + hop.compute_s):.1f} ms)"
            for hop in self.hops
        )


@dataclass(frozen=True, slots=True)
class _Cost:
    """What a server costs: once per visit, and per block."""

    record: ServerRecord
    network_s: float
    penalty_s: float
    block_s: float
    dice: float = 1.0

    @property
    def visit(self) -> float:
        return self.dice * (self.network_s + self.record.queue_s) + self.penalty_s

    @property
    def block(self) -> float:
        return self.dice * self.block_s


def find_route(
    view: SwarmView,
    blocks: range,
    *,
    mode: Literal["latency", "throughput"] = "latency",
    batch_size: int = 1,
    cache_tokens: int = 0,
    rng: Callable[[], float] | None = None,
    allowed: frozenset[PeerId] | None = None,
    blocked: frozenset[PeerId] = frozenset(),
    adapter: str | None = None,
    require_dtype: str | None = None,
) -> Route:
    """The route of the lowest expected time (latency), or a random one that spreads load (throughput).

    Args:
        blocks: which blocks, half-open.
        cache_tokens: tokens times rows that a session will need room for.
        rng: uniform numbers in [0, 1); needed for throughput.
        allowed: only these servers; None: any.
        adapter: only servers that host it. require_dtype: only unquantised servers that compute in it.
    Raises:
        MissingBlocks: names exactly the blocks that nobody suitable holds.
    """
    costs = [
        _cost(offer, mode, batch_size, cache_tokens, rng)
        for offer in view.offers
        if _suits(offer, blocks, allowed, blocked, adapter, require_dtype)
    ]
    held = {block for cost in costs for block in cost.record.blocks}
    if missing := [block for block in blocks if block not in held]:
        raise MissingBlocks(missing)
    return Route(tuple(_hop(cost, span) for cost, span in _shortest(costs, blocks)))


def _shortest(costs: list[_Cost], blocks: range) -> list[tuple[_Cost, range]]:
    starts: dict[int, list[int]] = {}
    for index, cost in enumerate(costs):
        starts.setdefault(max(cost.record.blocks.start, blocks.start), []).append(index)
    ends = [cost.record.blocks.stop for cost in costs]
    visit = [cost.visit for cost in costs]
    per_block = [cost.block for cost in costs]
    run = [math.inf] * len(costs)
    entered = [0] * len(costs)
    arrived: list[tuple[int, int]] = []  # per boundary behind the first: (server, where it was entered)
    best = 0.0
    active: list[int] = []
    for block in blocks:
        active = [index for index in active if ends[index] > block] + starts.get(block, [])
        cheapest, winner = math.inf, -1
        for index in active:
            fresh = best + visit[index]
            if fresh < run[index]:
                run[index] = fresh
                entered[index] = block
            run[index] += per_block[index]
            if run[index] < cheapest:
                cheapest, winner = run[index], index
        best = cheapest
        arrived.append((winner, entered[winner]))
    path: list[tuple[_Cost, range]] = []
    position = blocks.stop
    while position > blocks.start:
        index, start = arrived[position - blocks.start - 1]
        path.append((costs[index], range(start, position)))
        position = start
    return path[::-1]


def _suits(
    offer: Offer,
    blocks: range,
    allowed: frozenset[PeerId] | None,
    blocked: frozenset[PeerId],
    adapter: str | None,
    require_dtype: str | None,
) -> bool:
    record = offer.record
    return (
        (allowed is None or record.peer_id in allowed)
        and record.peer_id not in blocked
        and record.blocks.start < blocks.stop
        and blocks.start < record.blocks.stop
        and (adapter is None or adapter in record.adapters)
        and (require_dtype is None or (record.dtype == require_dtype and record.quant_type == "none"))
    )


def _cost(
    offer: Offer,
    mode: Literal["latency", "throughput"],
    batch_size: int,
    cache_tokens: int,
    rng: Callable[[], float] | None,
) -> _Cost:
    record = offer.record
    network_s = UNKNOWN_ROUND_TRIP_S if offer.round_trip_s is None else offer.round_trip_s
    penalty_s = 0.0
    if cache_tokens > record.cache_tokens_left and mode == "latency":
        penalty_s += NO_ROOM_S
    if offer.ban_left_s > 0:
        penalty_s += BANNED_S + offer.ban_left_s
    rps = record.inference_rps if mode == "latency" else record.forward_rps
    dice = 1.0
    if mode == "throughput":
        if rng is None:
            raise ValueError("throughput mode throws dice: pass rng")
        dice = -math.log(1.0 - rng())
    return _Cost(
        record,
        network_s * (RELAY_FACTOR if record.using_relay else 1.0),
        penalty_s,
        batch_size / (rps or UNKNOWN_RPS),
        dice,
    )


def _hop(cost: _Cost, span: range) -> RouteHop:
    record = cost.record
    return RouteHop(record.peer_id, record.addrs, span, cost.network_s, record.queue_s, cost.block_s * len(span))
