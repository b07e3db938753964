"""`petals invite`: make a token that lets its bearer join. Starts without torch."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from petals.cli.base.addresses import check_addresses
from petals.cli.base.argument_types import at_least_1, number
from petals.cli.base.help_format import Formatter

MAX_DAYS = 3660

EXAMPLES = """
examples:
  petals invite --identity my.key --initial_peers ADDR              for whoever comes first, a week
  petals invite --identity my.key --initial_peers ADDR --peer ID    for the peer of that ID only
The server must run with this identity, or with --invited_by and its peer ID. The bearer joins with
  petals peer --generate "..." --identity FILE --invitation TOKEN
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "invite",
        help="make a token that lets its bearer join",
        description="Print an invitation, one line: whoever has it may use the blocks of servers that trust you, until "
        "it expires. It can not be taken back; the server's operator can --block its bearer.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--identity", metavar="FILE", type=Path, required=True, help="your key: you answer for it")
    parser.add_argument("--days", metavar="N", type=number(0, MAX_DAYS, above=True), default=7.0,
                        help="how long it holds (default: 7)")  # fmt: skip
    parser.add_argument("--peer", metavar="PEER_ID", help="only for this peer (default: for the first to come)")
    parser.add_argument("--uses", metavar="N", type=at_least_1, default=1,
                        help="how many peers each server may admit with it (default: 1)")  # fmt: skip
    parser.add_argument("--initial_peers", metavar="ADDR", nargs="+", default=[],
                        help="where to join; with them the token is all that its bearer needs")  # fmt: skip
    parser.add_argument("--model_digest", metavar="HEX", default="", help="only for servers of this model")
    parser.add_argument("--with_swarm_key", metavar="FILE", type=Path,
                        help="put the private swarm's key in: the token is then a secret")  # fmt: skip
    parser.set_defaults(run=run, synchronous=True, verbose=False)


def run(options: argparse.Namespace) -> None:
    """Print the token."""
    from petals.peer.base.identity import load_identity, parse_peer_id
    from petals.peer.membership.invitation import issue
    from petals.peer.net.swarm_key import load_swarm_key

    check_addresses("--initial_peers", options.initial_peers, named=True)
    key = load_swarm_key(options.with_swarm_key)
    token = issue(
        load_identity(options.identity),
        expires_at=time.time() + options.days * 86400,
        bearer=None if options.peer is None else parse_peer_id(options.peer),
        uses=options.uses,
        model_digest=options.model_digest,
        addrs=options.initial_peers,
        swarm_key=key,
    )
    if key is not None:
        print(
            "petals: THIS TOKEN CONTAINS THE SWARM KEY. Whoever reads it can enter the private swarm, for good and "
            "not only until it expires: pass it on like a password",
            file=sys.stderr,
        )
    if not options.initial_peers:
        print("petals: no --initial_peers: its bearer must be told an address, too", file=sys.stderr)
    print(token)
