"""Routes: exact against brute force, and every preference one by one."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals.dht.records import ServerRecord, ServerState
from petals.peer.client.routing.routing import UNKNOWN_ROUND_TRIP_S, UNKNOWN_RPS, Route, find_route, push_pays, why_not
from petals.peer.client.routing.view import Offer, SwarmView
from petals.protocols.errors import MissingBlocks
from petals.protocols.types import ModelId, PeerId

MODEL = ModelId("tiny", "ab" * 32)
ALL = range(5)


def offer(
    name: str, blocks: range, *, round_trip_s: float | None = 0.01, ban_left_s: float = 0.0, **fields: Any
) -> Offer:
    fields = {"inference_rps": 100.0, "forward_rps": 100.0, "cache_tokens_left": 1000} | fields
    record = ServerRecord(
        model=MODEL,
        peer_id=PeerId(name),
        blocks=blocks,
        state=ServerState.ONLINE,
        sequence=1,
        issued_at=0,
        expires_at=1,
        **fields,
    )
    return Offer(record, round_trip_s, ban_left_s)


def view(*offers: Offer) -> SwarmView:
    return SwarmView(MODEL, offers)


def peers(route: Route) -> list[tuple[str, range]]:
    return [(hop.peer_id, hop.blocks) for hop in route.hops]


seconds = st.integers(0, 30).map(lambda n: n / 1000)


@st.composite
def swarms(draw: st.DrawFn) -> SwarmView:
    names = [f"peer{n}" for n in range(draw(st.integers(0, 5)))]
    offers = []
    for name in names:
        start = draw(st.integers(0, 4))
        others = [other for other in names if other != name]
        legs = draw(st.dictionaries(st.sampled_from(others), seconds)) if others else {}
        offers.append(
            offer(
                name,
                range(start, draw(st.integers(start + 1, 6))),
                round_trip_s=draw(st.none() | seconds),
                inference_rps=draw(st.sampled_from([0.0, 50.0, 200.0, 1000.0])),
                queue_s=draw(seconds),
                using_relay=draw(st.booleans()),
                round_trips_s=legs,
            )
        )
    return view(*offers)


def every_route(swarm: SwarmView, blocks: range) -> Iterator[list[Offer]]:
    """All ways to give each block to a holder."""
    holders = [[each for each in swarm.offers if block in each.record.blocks] for block in blocks]
    yield from (list(way) for way in itertools.product(*holders))


def measured_leg(a: Offer, b: Offer) -> float | None:
    """The receiver's own measurement first."""
    here, there = b.record.round_trips_s.get(a.record.peer_id), a.record.round_trips_s.get(b.record.peer_id)
    return here if here is not None else there


def price(way: list[Offer], pushed: bool) -> float:
    """The definition, spelled out step by step."""

    def round_trip(each: Offer) -> float:
        known = UNKNOWN_ROUND_TRIP_S if each.round_trip_s is None else each.round_trip_s
        return known * (2 if each.record.using_relay else 1)

    hops = [way[0]] + [b for a, b in itertools.pairwise(way) if a is not b]
    total = sum(1 / (each.record.inference_rps or UNKNOWN_RPS) for each in way) + sum(h.record.queue_s for h in hops)
    if not pushed:
        return total + sum(round_trip(hop) for hop in hops)
    total += round_trip(hops[0]) / 2 + round_trip(hops[-1]) / 2
    for a, b in itertools.pairwise(hops):
        measured = measured_leg(a, b)
        total += ((round_trip(a) + round_trip(b)) / 2 if measured is None else measured) / 2
    return total


@settings(max_examples=300)
@given(swarms(), st.booleans())
def test_no_route_is_faster_and_holes_are_named(swarm: SwarmView, pushed: bool) -> None:
    holes = [block for block in ALL if not any(block in each.record.blocks for each in swarm.offers)]
    if holes:
        with pytest.raises(MissingBlocks) as missing:
            find_route(swarm, ALL, pushed=pushed)
        assert list(missing.value.blocks) == holes
        return
    route = find_route(swarm, ALL, pushed=pushed)
    assert [block for hop in route.hops for block in hop.blocks] == list(ALL)
    by_name = {each.record.peer_id: each for each in swarm.offers}
    way = [by_name[hop.peer_id] for hop in route.hops for _ in hop.blocks]
    assert all(block in each.record.blocks for block, each in zip(ALL, way, strict=True))
    best = min(price(other, pushed) for other in every_route(swarm, ALL))
    assert math.isclose(price(way, pushed), best, abs_tol=1e-12)
    assert math.isclose(route.expected_s, best, abs_tol=1e-12)


def test_a_part_of_a_span_is_enough() -> None:
    route = find_route(view(offer("a", range(8)), offer("b", range(4, 12))), range(2, 10))
    assert [block for hop in route.hops for block in hop.blocks] == list(range(2, 10))


def test_one_slow_hop_more_is_worth_a_fast_server() -> None:
    slow, fast = offer("slow", range(8), inference_rps=10), offer("fast", range(4, 8), inference_rps=1000)
    assert peers(find_route(view(slow, fast), range(8))) == [("slow", range(4)), ("fast", range(4, 8))]


def test_pushing_follows_the_short_measured_leg() -> None:
    first = offer("first", range(4), round_trip_s=0.1)
    near = offer("near", range(4, 8), round_trip_s=0.12, round_trips_s={PeerId("first"): 0.001})
    far = offer("far", range(4, 8), round_trip_s=0.1, round_trips_s={PeerId("first"): 0.3})
    assert peers(find_route(view(first, near, far), range(8), pushed=True))[1][0] == "near"
    assert peers(find_route(view(first, near, far), range(8)))[1][0] == "far"
    assert find_route(view(first, near), range(8), pushed=True).hops[1].network_s == pytest.approx(0.0005 + 0.06)


@pytest.mark.parametrize(
    "worse",
    [
        {"queue_s": 1.0},
        {"round_trip_s": 0.5},
        {"round_trip_s": None},
        {"using_relay": True},
        {"inference_rps": 1.0},
        {"cache_tokens_left": 5},
        {"ban_left_s": 1.0},
    ],
)
def test_what_makes_a_server_the_worse_one(worse: dict[str, Any]) -> None:
    swarm = view(offer("worse", ALL, **worse), offer("better", ALL))
    assert peers(find_route(swarm, ALL, cache_tokens=10)) == [("better", ALL)]
    alone = find_route(view(offer("worse", ALL, **worse)), ALL, cache_tokens=10)
    assert peers(alone) == [("worse", ALL)]  # but rather that than nobody


def test_of_the_banned_the_one_whose_ban_ends_first() -> None:
    swarm = view(offer("long", ALL, ban_left_s=600.0), offer("short", ALL, ban_left_s=5.0, inference_rps=1.0))
    assert peers(find_route(swarm, ALL)) == [("short", ALL)]


def test_who_may_be_asked_at_all() -> None:
    swarm = view(offer("a", ALL), offer("b", ALL, adapters=("lora",), round_trip_s=1.0, dtype="bfloat16"))
    assert peers(find_route(swarm, ALL, adapter="lora")) == [("b", ALL)]
    assert peers(find_route(swarm, ALL, require_dtype="bfloat16")) == [("b", ALL)]
    with pytest.raises(MissingBlocks, match="and hosts adapter 'mine'"):
        find_route(swarm, ALL, adapter="mine")
    assert peers(find_route(swarm, ALL, allowed=frozenset({PeerId("b")}))) == [("b", ALL)]
    assert peers(find_route(swarm, ALL, blocked=frozenset({PeerId("a")}))) == [("b", ALL)]
    with pytest.raises(MissingBlocks) as missing:
        find_route(swarm, range(3, 7), allowed=frozenset({PeerId("b")}))
    assert missing.value.blocks == (5, 6)


def test_a_prompt_is_priced_by_the_speed_for_prompts() -> None:
    decoder = offer("decoder", ALL, inference_rps=1000.0, forward_rps=10.0)
    reader = offer("reader", ALL, inference_rps=10.0, forward_rps=1000.0)
    assert peers(find_route(view(decoder, reader), ALL))[0][0] == "decoder"
    assert peers(find_route(view(decoder, reader), ALL, new_tokens=100))[0][0] == "reader"


def test_throughput_spreads_load_in_proportion_to_speed() -> None:
    swarm = view(
        offer("fast", ALL, round_trip_s=0.0, forward_rps=300.0), offer("slow", ALL, round_trip_s=0.0, forward_rps=100.0)
    )
    dice = random.Random(1)
    routes = [find_route(swarm, ALL, mode="throughput", rng=dice.random) for _ in range(2000)]
    won = Counter(route.hops[0].peer_id for route in routes)
    assert won[PeerId("fast")] / 2000 == pytest.approx(0.75, abs=0.04)
    assert {round(route.expected_s, 6) for route in routes} == {round(5 / 300, 6), round(5 / 100, 6)}  # undiced


def test_a_route_describes_itself() -> None:
    swarm = view(offer("12D3KooWabcdef", range(2), round_trip_s=0.002, inference_rps=2000.0))
    assert find_route(swarm, range(2)).describe() == "0:2 via …abcdef (2.0 network + 0.0 queue + 1.0 compute = 3.0 ms)"


def test_everybody_who_was_not_chosen_has_a_reason() -> None:
    swarm = view(
        offer("used", ALL),
        offer("slow", range(2, 9), inference_rps=10.0, queue_s=0.02),
        offer("banned", ALL, ban_left_s=12.0),
        offer("full", ALL, cache_tokens_left=3),
        offer("refused", ALL),
        offer("blocked", ALL),
        offer("plain", ALL, adapters=()),
        offer("int8", ALL, quant_type="int8"),
        offer("bf16", ALL, dtype="bfloat16"),
        offer("elsewhere", range(5, 9)),
    )
    hosting = [replace(each, record=replace(each.record, adapters=("lora",))) for each in swarm.offers]
    hosting[6] = swarm.offers[6]
    leaving = replace(hosting[0].record, peer_id=PeerId("leaving"), state=ServerState.DRAINING)
    swarm = SwarmView(MODEL, tuple(hosting), (Offer(leaving, None),))
    wanted: dict[str, Any] = {"cache_tokens": 10, "adapter": "lora", "require_dtype": "float32"}
    route = find_route(swarm, ALL, blocked=frozenset({PeerId("blocked"), PeerId("refused")}), **wanted)
    skipped = why_not(
        swarm, ALL, route, blocked=frozenset({PeerId("blocked")}), refused=frozenset({PeerId("refused")}), **wanted
    )
    assert {each.hop.peer_id: each.reason for each in skipped} == {
        "slow": "slower: 330.0 ms",
        "banned": "banned for 12 s",
        "full": "full: room for 3 tokens",
        "refused": "refused just now",
        "blocked": "blocked",
        "plain": "does not host adapter lora",
        "int8": "quantised to int8",
        "bf16": "computes in bfloat16",
        "leaving": "draining",
    }
    assert next(each for each in skipped if each.hop.peer_id == "slow").describe() == "2:5 via …slow: slower: 330.0 ms"


def test_a_push_pays_where_the_way_by_the_client_is_long() -> None:
    pair = PeerId("a"), PeerId("b")

    def pays(there: float | None, back: float | None, **measured: float) -> bool:
        records = {PeerId(name): round_trip_s for name, round_trip_s in measured.items()}
        offers = (
            offer("a", range(2), round_trip_s=there),
            offer("b", range(2, 5), round_trip_s=back, round_trips_s=records),
        )
        return push_pays(view(*offers), *pair)

    assert not pays(0.0005, 0.0005, a=0.0005), "one machine"
    assert pays(0.1, 0.1, a=0.1), "three places far apart"
    assert pays(0.1, 0.1, a=0.001), "two servers of one place, and a client far away"
    assert not pays(0.001, 0.1, a=0.1), "a client beside the first server: by way of it is no detour"
    assert pays(0.1, 0.1), "nobody has measured the straight way: half of the other, as routes are planned"
    assert pays(None, 0.1)
    assert push_pays(view(), *pair)
