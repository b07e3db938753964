"""`petals status`: who holds what, how fast, and how the swarm is, in words. Starts without torch."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals.cli.base.argument_types import positive
from petals.cli.base.file_arguments import token_of
from petals.cli.base.help_format import Formatter
from petals.cli.base.terminal import say
from petals.cli.status.render import picture
from petals.protocols.errors import SwarmError, UserError

if TYPE_CHECKING:
    from petals.peer.membership.observer import ModelStatus

CLEAR = "\x1b[H\x1b[J"
PLOT_HEIGHT = 4
HERE = "http://127.0.0.1:8000"
"""Where `petals peer --http` listens unless told otherwise."""
EXAMPLES = """
examples:
  petals status --initial_peers ADDR                      once; ADDR is what a peer prints when it starts
  petals status --initial_peers ADDR --watch              again and again
  petals status --initial_peers ADDR --json | jq '.models[].health'
  petals status --url --watch                             the routes and throughput of the peer here with --http
  petals status --url http://10.0.0.5:8000 --api_key @my.key
  petals status --identity my.key                         what this peer gave and took
"""

Look = Callable[[], Awaitable[dict[str, Any]]]


def _lasts(options: argparse.Namespace) -> bool:
    """Whether the command goes on until it is ended."""
    return bool(options.watch)


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "status",
        help="who holds what, how fast, and how the swarm is",
        description="Say of every model in the swarm who holds which blocks, and whether it is healthy (two or more "
        "copies of every block), degraded (one copy somewhere) or broken (a block that nobody holds). Of each peer: "
        "how others reach it (direct, mapped, relayed), and how this command did (direct, punched, relayed). With "
        "--url: as a running peer sees it, with the routes of the answers it is generating and its throughput over "
        "the last half hour.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--initial_peers", metavar="ADDR", nargs="+", default=[], help="peers of the swarm")
    parser.add_argument(
        "--invitation", metavar="TOKEN", help="instead: they, and the swarm key, may be in it; or @FILE"
    )
    parser.add_argument("--swarm_key", metavar="FILE", type=Path, help="key of a private swarm")
    parser.add_argument("--url", metavar="URL", nargs="?", const=HERE,
                        help="ask the peer that answers HTTP there (petals peer --http) instead; flags that name a "
                        f"swarm or a key file are then left alone (default: {HERE})")  # fmt: skip
    parser.add_argument("--api_key", metavar="KEY", help="of --url, where that peer wants one; or @FILE")
    parser.add_argument("--identity", metavar="FILE", type=Path,
                        help="the key file of a peer of yours: what it gave to others and took from them, as of the "
                        "last minute; does not need --initial_peers")  # fmt: skip
    parser.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    parser.add_argument("--interval", metavar="S", type=positive, default=2.0, help="of --watch (default: 2 s)")
    parser.add_argument("--json", action="store_true", help="one JSON object per look on stdout")
    parser.add_argument("--verbose", "-v", action="store_true", help="logs of what happens, on stderr")
    parser.set_defaults(run=run, synchronous=False, lasts=_lasts)


async def run(options: argparse.Namespace) -> None:
    """Look once, or until cancelled. Who watches wants to see a peer come back, too: only the first look may fail."""
    import trio

    live = options.watch and sys.stdout.isatty() and not options.json
    shown = ""
    async with _open(options) as look:
        while True:
            try:
                told = await look()
                text = json.dumps(told) if options.json else _fitting(told, live=live)
            except SwarmError as error:
                if not shown:
                    raise
                text = " ".join(str(error).split())
                if text != shown and not live:
                    say(text)
                if live:
                    print(f"{CLEAR}{text}\nlooking again; Ctrl-C ends", flush=True)
            else:
                print(f"{CLEAR if live else ''}{text}", flush=True)
            shown = text
            if not options.watch:
                return
            await trio.sleep(max(0.1, options.interval))


@asynccontextmanager
async def _open(options: argparse.Namespace) -> AsyncIterator[Look]:
    """Whom the flags want asked."""
    import trio

    if options.url is not None:
        from petals.cli.status.client import ask_swarm, read_address

        door, key = read_address(options.url), token_of(options.api_key)

        async def ask() -> dict[str, Any]:
            return await ask_swarm(door, None if key is None else key.strip())

        yield ask
        return

    from petals.peer.membership.observer import open_observer, read_contribution

    async def account() -> dict[str, Any]:
        if options.identity is None:
            return {}
        return {"contribution": await trio.to_thread.run_sync(read_contribution, options.identity)}

    if not options.initial_peers and options.invitation is None:
        if options.identity is None:
            raise UserError(
                "whose status? give --initial_peers ADDR or --invitation TOKEN for a swarm, --url for what a peer with "
                "--http sees, --identity FILE for what a peer of yours gave and took"
            )
        yield account
        return
    invitation = token_of(options.invitation)
    async with open_observer(
        tuple(options.initial_peers), swarm_key=options.swarm_key, invitation=invitation
    ) as observer:

        async def observe() -> dict[str, Any]:
            models = [as_json(model) for model in await observer.look()]
            return {"models": models, "warnings": observer.warnings(), **await account()}

        yield observe


def _fitting(told: dict[str, Any], *, live: bool) -> str:
    """For people, no wider than the terminal and, where it is watched, no higher."""
    try:
        if not sys.stdout.isatty():
            return picture(told)
        columns, rows = shutil.get_terminal_size()
        bright = not os.environ.get("NO_COLOR")
        for height in range(PLOT_HEIGHT, 0, -1):
            text = picture(told, width=columns, plot_height=height, bright=bright)
            if not live or text.count("\n") + 1 < rows:
                return text
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # a peer's own words may be of any shape
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"the answer is not one of this version of Petals ({reason}); --json shows it") from None
    lines = text.splitlines()
    more = f"… {len(lines) - rows + 2} more lines; make the window higher, or leave --watch out"
    return "\n".join([*lines[: rows - 2], more])


def as_json(status: ModelStatus) -> dict[str, Any]:
    """For machines, and for `picture`."""
    from petals.dht import health

    return {
        **health.describe(status.model, status.copies),
        "peers": [
            {
                **record.as_json(),
                "link": status.links.get(record.peer_id, ""),
                "addrs": list(record.addrs),
            }
            for record in status.records
        ],
    }
