"""How long choosing a route takes: 1,000 servers, 100 blocks. Run: python benchmarks/routing.py"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from petals.dht.records import ServerRecord, ServerState
from petals.peer.client.routing.routing import find_route
from petals.peer.client.routing.view import Offer, SwarmView
from petals.protocols.types import ModelId, PeerId

MODEL = ModelId("benchmark", "0" * 64)


def make_view(servers: int, blocks: int, measured: int, dice: random.Random) -> SwarmView:
    """Spans of 4 to 24 blocks, speeds over a factor of 20, round trips of 5 to 200 ms."""
    names = [PeerId(f"12D3KooW{n:044d}") for n in range(servers)]
    offers = []
    for name in names:
        length = dice.randint(4, min(24, blocks))
        start = dice.randint(0, blocks - length)
        record = ServerRecord(
            model=MODEL,
            peer_id=name,
            blocks=range(start, start + length),
            state=ServerState.ONLINE,
            inference_rps=dice.uniform(50, 1000),
            forward_rps=dice.uniform(500, 10000),
            queue_s=dice.expovariate(100),
            cache_tokens_left=dice.randint(0, 100_000),
            round_trips_s={other: dice.uniform(0.002, 0.2) for other in dice.sample(names, measured)},
            sequence=1,
            issued_at=0,
            expires_at=1,
        )
        offers.append(Offer(record, dice.uniform(0.005, 0.2), 10.0 if dice.random() < 0.02 else 0.0))
    return SwarmView(MODEL, tuple(offers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--measured", type=int, default=16, help="round trips published by each server")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    dice = random.Random(0)
    views = [make_view(options.servers, options.blocks, options.measured, dice) for _ in range(3)]
    print(f"{options.servers} servers x {options.blocks} blocks, {options.measured} measured legs per server")
    for name, arguments in {
        "latency, every hop answers us": {},
        "latency, servers push": {"pushed": True},
        "throughput": {"mode": "throughput", "rng": dice.random},
    }.items():
        times, hops = [], 0
        for _ in range(options.repeats):
            for view in views:
                started = time.perf_counter()
                route = find_route(view, range(options.blocks), cache_tokens=1000, **arguments)  # type: ignore[arg-type]
                times.append(time.perf_counter() - started)
                hops += len(route.hops)
        print(
            f"{name:32} median {1e3 * statistics.median(times):6.1f} ms   max {1e3 * max(times):6.1f} ms   "
            f"{hops / len(times):.1f} hops"
        )


if __name__ == "__main__":
    main()
