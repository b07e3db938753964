"""Which servers a request goes through. Pure: a frozen view in, a route out; the dice are passed in.

Theory. A step costs, for each server of the route, the way to it, the wait for its compute thread and the compute time
of its blocks. The best route is a shortest path over block boundaries: let `run[s]` be the best time of having passed
all blocks up to a boundary, the last of them inside server s. Going on costs the server's seconds per block; changing
to another one costs the leg between the two, and its queue.

Where every hop answers the client, the leg from a to b leads through the client: half a round trip of each. That is
separable, so the best predecessor is the same for all. Where servers push to each other, a leg that one of them has
measured costs half of that round trip, and one that nobody has is guessed as half the mean of both round trips to us,
which is separable again: only the few measured legs need a look of their own. Both are exact, and tested so.

How fast a server is, it says itself; once it has answered steps of ours, what these took counts instead (speeds.py).

For training the same path is searched with every server's cost multiplied by its own throw of an exponential die: fast
servers win most often, everybody wins sometimes, so that load spreads in proportion to speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from petals.dht.records import ServerRecord, ServerState
from petals.protocols.errors import MissingBlocks, describe_blocks
from petals.protocols.types import PeerId

if TYPE_CHECKING:
    from petals.peer.client.routing.view import Offer, SwarmView

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

    @property
    def expected_s(self) -> float:
        """One step through it."""
        return self.network_s + self.queue_s + self.compute_s

    def describe(self) -> str:
        """For people, in milliseconds."""
        return (
            f"{self.blocks.start}:{self.blocks.stop} via …{self.peer_id[-6:]} ({1e3 * self.network_s:.1f} network + "
            f"{1e3 * self.queue_s:.1f} queue + {1e3 * self.compute_s:.1f} compute = {1e3 * self.expected_s:.1f} ms)"
        )

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "peer_id": self.peer_id,
            "blocks": [self.blocks.start, self.blocks.stop],
            "network_s": self.network_s,
            "queue_s": self.queue_s,
            "compute_s": self.compute_s,
        }


@dataclass(frozen=True, slots=True)
class Route:
    """Servers that hold all blocks asked for, in order."""

    hops: tuple[RouteHop, ...]

    @property
    def expected_s(self) -> float:
        """One step through all of it."""
        return sum(hop.expected_s for hop in self.hops)

    def describe(self) -> str:
        """For people: "0:12 via …abcdef (2.0 network + 0.1 queue + 1.0 compute = 3.1 ms) => 12:24 via …"."""
        return " => ".join(hop.describe() for hop in self.hops)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A server that a route does not use, what it would take for its blocks, and why it was passed over."""

    hop: RouteHop
    reason: str

    def describe(self) -> str:
        """For people: "0:12 via …abcdef: full"."""
        return f"{self.hop.blocks.start}:{self.hop.blocks.stop} via …{self.hop.peer_id[-6:]}: {self.reason}"


@dataclass(frozen=True, slots=True)
class RouteChoice:
    """A route, and whom it was preferred to."""

    route: Route
    skipped: tuple[Skipped, ...]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "expected_route": [hop.as_json() for hop in self.route.hops],
            "skipped": [{**each.hop.as_json(), "reason": each.reason} for each in self.skipped],
        }


@dataclass(frozen=True, slots=True)
class _Cost:
    """What a server costs, in seconds; everything but the penalty is multiplied by its die."""

    record: ServerRecord
    one_way_s: float
    """Between it and us."""
    penalty_s: float
    block_s: float
    queue_s: float
    dice: float = 1.0

    @property
    def visit(self) -> float:
        return self.dice * self.queue_s + self.penalty_s


class _Legs:
    """What it costs to go from one server to another: `half[a] + half[b]`, unless `measured[b]` knows a."""

    def __init__(self, costs: list[_Cost], pushed: bool) -> None:
        self.ends = [cost.dice * cost.one_way_s for cost in costs]
        self.half = [end / 2 for end in self.ends] if pushed else self.ends
        self.measured: list[dict[int, float]] = [{} for _ in costs]
        if pushed:
            self._note_measured(costs)
        self.shortest = [min(measured.values(), default=math.inf) for measured in self.measured]
        """The shortest measured leg to each server."""

    def _note_measured(self, costs: list[_Cost]) -> None:
        index_of = {cost.record.peer_id: index for index, cost in enumerate(costs)}
        starts = [cost.record.blocks.start for cost in costs]
        stops = [cost.record.blocks.stop for cost in costs]
        measured = self.measured
        for here, cost in enumerate(costs):
            start, stop, half_dice = starts[here], stops[here], cost.dice / 2
            for peer_id, round_trip_s in cost.record.round_trips_s.items():
                there = index_of.get(peer_id, here)
                if there == here:
                    continue
                # A leg counts in both directions, as far as blocks of the one can follow blocks of the other; where
                # both ends have measured it, the receiver's word holds.
                if start <= stops[there] and starts[there] < stop - 1:
                    measured[here][there] = half_dice * round_trip_s
                if starts[there] <= stop and start < stops[there] - 1 and here not in measured[there]:
                    measured[there][here] = costs[there].dice * round_trip_s / 2

    def cost(self, before: int, after: int) -> float:
        known = self.measured[after].get(before)
        return self.half[before] + self.half[after] if known is None else known


_Trail = tuple[int, int, "_Trail | None"]
"""(server, block where it was entered, the trail before)"""


def find_route(
    view: SwarmView,
    blocks: range,
    *,
    mode: Literal["latency", "throughput"] = "latency",
    pushed: bool = False,
    batch_size: int = 1,
    new_tokens: int = 1,
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
        pushed: servers send to each other and only the last answers us; else every hop answers us.
        new_tokens: per row, of one step.
        cache_tokens: tokens times rows that a session will need room for.
        rng: uniform numbers in [0, 1); needed for throughput.
        allowed: only these servers; None: any.
        adapter: only servers that host it. require_dtype: only unquantised servers that compute in it.
    Raises:
        MissingBlocks: names exactly the blocks that nobody suitable holds.
    """
    costs = [
        _cost(offer, mode, batch_size, new_tokens, cache_tokens, rng)
        for offer in view.offers
        if _overlaps(offer.record, blocks)
        and _objection(offer.record, allowed, blocked, adapter, require_dtype) is None
    ]
    held = {block for cost in costs for block in cost.record.blocks}
    if missing := [block for block in blocks if block not in held]:
        hosting = "" if adapter is None else f" and hosts adapter {adapter!r}"
        raise MissingBlocks(missing, f"no peer of the swarm holds {describe_blocks(missing)}{hosting}")
    if not blocks:
        return Route(())
    legs = _Legs(costs, pushed)
    return _as_route(costs, _shortest(costs, legs, blocks), blocks, pushed)


def _shortest(costs: list[_Cost], legs: _Legs, blocks: range) -> _Trail:
    starts: dict[int, list[int]] = {}
    for index, cost in enumerate(costs):
        starts.setdefault(max(cost.record.blocks.start, blocks.start), []).append(index)
    stops = [cost.record.blocks.stop for cost in costs]
    visit = [cost.visit for cost in costs]
    per_block = [cost.dice * cost.block_s for cost in costs]
    half, measured, shortest = legs.half, legs.measured, legs.shortest
    run = [math.inf] * len(costs)
    trail: list[_Trail | None] = [None] * len(costs)
    active: list[int] = []
    for block in blocks:
        # `active` have run up to this boundary; those that end here can still be left, but not stayed in.
        before = sorted((run[index] + half[index], index) for index in active)
        shortest_run = min((run[index] for index in active), default=0.0)
        leaving = {index: (run[index], trail[index]) for index in active}
        active = [index for index in active if stops[index] > block] + starts.get(block, [])
        for index in active:
            if not before:
                run[index], trail[index] = legs.ends[index] + visit[index], (index, block, None)
                continue
            # Most servers are better entered once than again and again: look only where it could help.
            known, enter, via = measured[index], run[index] - visit[index], -1
            if before[0][0] + half[index] < enter:
                for so_far, other in before:  # the first one without a measured leg is the best of its kind
                    if so_far + half[index] >= enter:
                        break
                    if other not in known:
                        enter, via = so_far + half[index], other
                        break
            if shortest_run + shortest[index] < enter:
                for other, leg in known.items():
                    if other in leaving and leaving[other][0] + leg < enter:
                        enter, via = leaving[other][0] + leg, other
            if via >= 0:
                run[index], trail[index] = enter + visit[index], (index, block, leaving[via][1])
        for index in active:
            run[index] += per_block[index]
    final = min(active, key=lambda index: run[index] + legs.ends[index])
    path = trail[final]
    assert path is not None  # every block is held: each active server has been entered
    return path


def _as_route(costs: list[_Cost], path: _Trail, blocks: range, pushed: bool) -> Route:
    """The trail read backwards, with the times one expects instead of those that were diced for."""
    walked: list[tuple[int, range]] = []
    end = blocks.stop
    trail: _Trail | None = path
    while trail is not None:
        index, start, trail = trail
        walked.append((index, range(start, end)))
        end = start
    walked.reverse()
    visited = sorted({index for index, _ in walked})  # a server may be visited twice
    legs = _Legs([replace(costs[index], dice=1.0) for index in visited], pushed)
    hops: list[RouteHop] = []
    for place, (index, span) in enumerate(walked):
        cost = costs[index]
        there = cost.one_way_s
        if pushed and place > 0:
            there = legs.cost(visited.index(walked[place - 1][0]), visited.index(index))
        back = cost.one_way_s if not pushed or place == len(walked) - 1 else 0.0
        record = cost.record
        hops.append(RouteHop(record.peer_id, record.addrs, span, there + back, cost.queue_s, cost.block_s * len(span)))
    return Route(tuple(hops))


PUSH_S = 0.002
"""What a pushed step costs more than one whose answer the client passes on: the push has a stream of its own, and the
client is sent its copy all the same. Measured on one machine (docs/failover.md)."""


def push_pays(view: SwarmView, before: PeerId, after: PeerId) -> bool:
    """Whether a step gets from server to server sooner on the straight way than by way of the client."""
    offers = {offer.record.peer_id: offer for offer in view.offers if offer.record.peer_id in (before, after)}
    round_trips = [offers[peer_id].round_trip_s if peer_id in offers else None for peer_id in (before, after)]
    if None in round_trips:
        return True  # not measured: a stranger is far away
    around_s = sum(filter(None, round_trips)) / 2
    straight_s = offers[after].record.round_trips_s.get(before, around_s) / 2
    return around_s - straight_s > PUSH_S


def why_not(
    view: SwarmView,
    blocks: range,
    route: Route,
    *,
    batch_size: int = 1,
    new_tokens: int = 1,
    cache_tokens: int = 0,
    allowed: frozenset[PeerId] | None = None,
    blocked: frozenset[PeerId] = frozenset(),
    refused: frozenset[PeerId] = frozenset(),
    adapter: str | None = None,
    require_dtype: str | None = None,
) -> tuple[Skipped, ...]:
    """Every server of the view that holds some of `blocks` and is not on `route`, with the reason.

    Args: as `find_route` was given them, for latency. refused: who would not open a session just now.
    """
    used = {hop.peer_id for hop in route.hops}
    skipped: list[Skipped] = []
    for offer in (*view.offers, *view.away):
        record = offer.record
        if record.peer_id in used or not _overlaps(record, blocks):
            continue
        cost = _cost(offer, "latency", batch_size, new_tokens, cache_tokens, None)
        span = range(max(record.blocks.start, blocks.start), min(record.blocks.stop, blocks.stop))
        hop = RouteHop(record.peer_id, record.addrs, span, 2 * cost.one_way_s, cost.queue_s, cost.block_s * len(span))
        reason = _objection(record, allowed, blocked, adapter, require_dtype)
        if record.state is not ServerState.ONLINE:
            reason = record.state.name.lower()
        elif reason is None and record.peer_id in refused:
            reason = "refused just now"
        elif reason is None and offer.ban_left_s > 0:
            reason = f"banned for {offer.ban_left_s:.0f} s"
        elif reason is None and cache_tokens > record.cache_tokens_left:
            reason = f"full: room for {record.cache_tokens_left} tokens"
        skipped.append(Skipped(hop, reason or f"slower: {1e3 * hop.expected_s:.1f} ms"))
    return tuple(skipped)


def _overlaps(record: ServerRecord, blocks: range) -> bool:
    return record.blocks.start < blocks.stop and blocks.start < record.blocks.stop


def _objection(
    record: ServerRecord,
    allowed: frozenset[PeerId] | None,
    blocked: frozenset[PeerId],
    adapter: str | None,
    require_dtype: str | None,
) -> str | None:
    """Why a server may not be asked at all; None: it may."""
    if allowed is not None and record.peer_id not in allowed:
        return "not among the allowed"
    if record.peer_id in blocked:
        return "blocked"
    if adapter is not None and adapter not in record.adapters:
        return f"does not host adapter {adapter}"
    if require_dtype is not None and record.quant_type != "none":
        return f"quantised to {record.quant_type}"
    if require_dtype is not None and record.dtype != require_dtype:
        return f"computes in {record.dtype}"
    return None


def _cost(
    offer: Offer,
    mode: Literal["latency", "throughput"],
    batch_size: int,
    new_tokens: int,
    cache_tokens: int,
    rng: Callable[[], float] | None,
) -> _Cost:
    record = offer.record
    round_trip_s = UNKNOWN_ROUND_TRIP_S if offer.round_trip_s is None else offer.round_trip_s
    penalty_s = 0.0
    if cache_tokens > record.cache_tokens_left and mode == "latency":
        penalty_s += NO_ROOM_S
    if offer.ban_left_s > 0:
        penalty_s += BANNED_S + offer.ban_left_s
    decodes = mode == "latency" and new_tokens == 1
    rps = record.inference_rps if decodes else record.forward_rps
    block_s, queue_s = batch_size * new_tokens / (rps or UNKNOWN_RPS), record.queue_s
    if offer.measured_block_s is not None and decodes:  # the wait in the queue was in it
        block_s, queue_s = batch_size * offer.measured_block_s, 0.0
    dice = 1.0
    if mode == "throughput":
        if rng is None:
            raise ValueError("throughput mode throws dice: pass rng")
        dice = -math.log(1.0 - rng())
    return _Cost(
        record,
        round_trip_s / 2 * (RELAY_FACTOR if record.using_relay else 1.0),
        penalty_s,
        block_s,
        queue_s,
        dice,
    )
