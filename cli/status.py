"""`petals status`: who holds what, how fast, and how the swarm is, in words. Starts without torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals.cli.helping import Formatter
from petals.cli.numbers import positive
from petals.protocols.errors import UserError

if TYPE_CHECKING:
    from petals.dht.records import ServerRecord
    from petals.peer.status import ModelStatus

CLEAR = "\x1b[H\x1b[J"
EXAMPLES = """
examples:
  petals status --initial_peers ADDR                      once; ADDR is what a peer prints when it starts
  petals status --initial_peers ADDR --watch              again and again
  petals status --initial_peers ADDR --json | jq '.models[].health'
  petals status --identity my.key                         what this peer gave and took
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "status",
        help="who holds what, how fast, and how the swarm is",
        description="Say of every model in the swarm who holds which blocks, and whether it is healthy (two or more "
        "copies of every block), degraded (one copy somewhere) or broken (a block that nobody holds). Of each peer: "
        "how others reach it (direct, mapped, relayed), and how this command did (direct, punched, relayed).",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--initial_peers", metavar="ADDR", nargs="+", default=[], help="peers of the swarm")
    parser.add_argument(
        "--invitation", metavar="TOKEN", help="instead: they, and the swarm key, may be in it; or @FILE"
    )
    parser.add_argument("--swarm_key", metavar="FILE", type=Path, help="key of a private swarm")
    parser.add_argument("--identity", metavar="FILE", type=Path,
                        help="the key file of a peer of yours: what it gave to others and took from them, as of the "
                        "last minute; does not need --initial_peers")  # fmt: skip
    parser.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    parser.add_argument("--interval", metavar="S", type=positive, default=2.0, help="of --watch (default: 2 s)")
    parser.add_argument("--json", action="store_true", help="one JSON object per look on stdout")
    parser.add_argument("--verbose", "-v", action="store_true", help="logs of what happens, on stderr")
    parser.set_defaults(run=run, synchronous=False)


async def run(options: argparse.Namespace) -> None:
    """Look once, or until cancelled."""
    import trio

    from petals.cli.peer import token_of
    from petals.peer.status import open_observer, read_contribution

    if not options.initial_peers and options.invitation is None:
        if options.identity is None:
            raise UserError(
                "whose status? give --initial_peers ADDR or --invitation TOKEN for a swarm, --identity FILE for a peer "
                "of yours"
            )
        own = await trio.to_thread.run_sync(read_contribution, options.identity)
        print(json.dumps({"contribution": own}) if options.json else balance(own), flush=True)
        return
    invitation = token_of(options.invitation)
    live = options.watch and sys.stdout.isatty() and not options.json
    async with open_observer(
        tuple(options.initial_peers), swarm_key=options.swarm_key, invitation=invitation
    ) as observer:
        while True:
            models = await observer.look()
            contribution = None
            if options.identity is not None:
                contribution = await trio.to_thread.run_sync(read_contribution, options.identity)
            if options.json:
                told: dict[str, Any] = {"models": [as_json(model) for model in models]}
                print(json.dumps(told if contribution is None else told | {"contribution": contribution}), flush=True)
            else:
                texts = [describe(model) for model in models]
                text = "\n\n".join(texts if contribution is None else [*texts, balance(contribution)])
                print(f"{CLEAR if live else ''}{text}", flush=True)
            if not options.watch:
                return
            await trio.sleep(max(0.1, options.interval))


def describe(status: ModelStatus) -> str:
    """For people."""
    state, why = status.health
    count = status.num_blocks
    lines = [
        f"{status.model.name}: {state}, {why}",
        f"blocks 0:{count}, copies of each: {''.join(str(min(copies, 9)) for copies in status.copies)}",
        f"{'blocks':>9}  {'peer':<9} {'state':<9} {'blocks/s':>9} {'queue ms':>9} {'cache tokens':>13}  "
        f"{'reach':<8} {'link':<8} version",
    ]
    lines += [_row(record, status.links.get(record.peer_id, "")) for record in status.records]
    return "\n".join([*lines, *_round_trips(status.records)])


def balance(contribution: dict[str, Any]) -> str:
    """What a peer gave and took, for people."""
    lines = [
        f"given {contribution['given']:,} block-tokens, taken {contribution['taken']:,}",
        f"{'peer':<9} {'gave us':>15} {'got from us':>15} {'balance':>15} {'weight':>7}",
    ]
    lines += [
        f"…{peer['peer_id'][-6:]:<8} {peer['taken']:>15,} {peer['given']:>15,} {peer['balance']:>15,} "
        f"{peer['weight']:>7.1f}"
        for peer in contribution["peers"]
    ]
    return "\n".join(lines)


def _row(record: ServerRecord, link: str) -> str:
    # Names and versions are a stranger's words: no control characters in somebody's terminal.
    name, version, reach = (
        "".join(char for char in text if char.isprintable())
        for text in (record.public_name, record.version, record.reachability[:8])
    )
    blocks = f"{record.blocks.start}:{record.blocks.stop}"
    return (
        f"{blocks:>9}  …{record.peer_id[-6:]:<8} {record.state.name.lower():<9} {record.inference_rps:>9,.0f} "
        f"{1e3 * record.queue_s:>9.1f} {record.cache_tokens_left:>13,}  "
        f"{reach:<8} {link:<8} {version} {name}"
    ).rstrip()


def _round_trips(records: Sequence[ServerRecord]) -> list[str]:
    """What servers measured to those that hold the blocks after theirs; peers that are not shown are left out."""
    shown = {record.peer_id for record in records}
    lines = []
    for record in records:
        told = [
            f"…{peer[-6:]} {1e3 * seconds:.1f} ms"
            for peer, seconds in sorted(record.round_trips_s.items(), key=lambda each: each[1])
            if peer in shown
        ]
        if told:
            lines.append(f"round trips from …{record.peer_id[-6:]} to {', '.join(told[:8])}")
    return lines


def as_json(status: ModelStatus) -> dict[str, Any]:
    """For machines."""
    state, why = status.health
    return {
        "model": status.model.name,
        "digest": status.model.digest,
        "num_blocks": status.num_blocks,
        "health": state,
        "words": why,
        "copies": status.copies,
        "weakest": [status.weakest.start, status.weakest.stop],
        "peers": [
            {
                "peer_id": record.peer_id,
                "name": record.public_name,
                "blocks": [record.blocks.start, record.blocks.stop],
                "state": record.state.name.lower(),
                "version": record.version,
                "dtype": record.dtype,
                "quant_type": record.quant_type,
                "decode_blocks_per_s": record.inference_rps,
                "prefill_blocks_per_s": record.forward_rps,
                "queue_s": record.queue_s,
                "cache_tokens_left": record.cache_tokens_left,
                "relayed": record.using_relay,
                "reachability": record.reachability,
                "link": status.links.get(record.peer_id, ""),
                "round_trips_s": {str(peer): seconds for peer, seconds in record.round_trips_s.items()},
                "addrs": list(record.addrs),
            }
            for record in status.records
        ],
    }
