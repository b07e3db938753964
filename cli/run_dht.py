"""`python -m petals.cli.run_dht`: a peer that only keeps the directory. Starts without importing torch."""

from __future__ import annotations

import argparse
import json
import sys

from petals.cli.base.file_arguments import token_of
from petals.cli.imports import importing
from petals.cli.main import main
from petals.cli.run_server import translated


async def keep_directory(options: argparse.Namespace) -> None:
    """Hold the swarm's directory until cancelled."""
    with importing():
        import trio

        from petals.cli.peer import lan_config, nat_config, peer_ids
        from petals.peer.bootstrap import open_bootstrap

    async with open_bootstrap(
        identity=options.identity,
        listen=tuple(options.listen),
        initial_peers=tuple(options.initial_peers),
        swarm_key=options.swarm_key,
        invitation=token_of(options.invitation),
        blocked=peer_ids(options.block),
        transport=options.transport,
        relay=nat_config(options).relay,
        lan=lan_config(options),
        wait=True,
        progress=lambda line: print(f"petals: {line}", file=sys.stderr, flush=True),
    ) as host:
        if options.json:
            print(json.dumps({"peer_id": host.peer_id, "addrs": list(host.addrs)}), flush=True)
        else:
            print("petals: keeping the directory. Other peers join with", file=sys.stderr)
            for addr in host.addrs:
                print(f"--initial_peers {addr}", file=sys.stderr, flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    main(["peer", "--bootstrap", *translated(sys.argv[1:]).peer_words()])
