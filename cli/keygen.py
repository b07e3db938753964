"""`petals keygen`: make a key file, so that a peer keeps its name."""

from __future__ import annotations

import argparse
from pathlib import Path

from petals.cli.base.argument_types import at_least_1
from petals.cli.base.help_format import Formatter
from petals.protocols.errors import UserError

EXAMPLES = """
examples:
  petals keygen my.key                                    a name that stays: petals peer --identity my.key
  petals keygen --swarm swarm.key                         a private swarm: petals peer --swarm_key swarm.key
  petals keygen --api keys.txt --name "a friend"          who may ask: petals peer --http --api_keys keys.txt
"""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "keygen",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        help="make a key file for --identity, a private swarm's key, or an API key",
        description="Write a new private key (libp2p's protobuf form, mode 0600) and print the peer ID that it gives. "
        "With --swarm, write the key that the peers of a private swarm share, and print its fingerprint.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="where to write; an existing file is never overwritten")
    parser.add_argument("--api", action="store_true", help="make an API key instead, and add its hash to FILE")
    parser.add_argument("--swarm", action="store_true", help="make a key for --swarm_key instead; keep it secret")
    parser.add_argument("--name", default="", help="whom the API key is for; stands beside its hash")
    parser.add_argument(
        "--requests_per_minute", metavar="N", type=at_least_1, help="what the API key may ask (default: no limit)"
    )
    parser.add_argument(
        "--answers", metavar="N", type=at_least_1, help="of the API key, generated at once (default: no limit)"
    )
    parser.add_argument("--type", choices=("ed25519", "rsa"), default="ed25519", help="kind of key (default: ed25519)")
    parser.set_defaults(run=run, synchronous=True, verbose=False)


def run(options: argparse.Namespace) -> None:
    """Write the key and print its peer ID; or a swarm key and its fingerprint; or make an API key and print that."""
    if options.api and options.swarm:
        raise UserError("--api and --swarm make different keys: give one of them")
    if options.api:
        from petals.gateway.keys import Limits, create_key

        limits = Limits(requests_per_minute=options.requests_per_minute, answers=options.answers)
        print(create_key(options.file, options.name, limits))
        return
    if options.name or options.requests_per_minute is not None or options.answers is not None:
        raise UserError("--name, --requests_per_minute and --answers are about API keys: give --api, too")
    if options.swarm:
        from petals.peer.net.swarm_key import create_swarm_key

        print(create_swarm_key(options.file).fingerprint)
        return
    from petals.peer.base.identity import create_identity

    identity = create_identity(options.file, key_type=options.type)
    print(identity.peer_id)
