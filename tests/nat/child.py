"""One machine of the lab: a relay, a server that echoes, or a client. Says what happens in lines of JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
from functools import partial

import trio

from petals.peer.base.config import LanConfig, NatConfig, RelayLimits
from petals.peer.base.identity import create_identity
from petals.peer.bootstrap import open_bootstrap
from petals.peer.membership.joining import open_membership
from petals.peer.membership.reachability import Ladder
from petals.peer.net.host import Host, HostConfig
from petals.protocols.errors import SwarmError
from petals.protocols.stream import ByteStream, MessageStream

ECHO = "/test/echo/1"
LISTEN = ("/ip4/0.0.0.0/tcp/4001",)
PAYLOAD = bytes(range(256)) * 400


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


async def echo(stream: ByteStream) -> None:
    while piece := await stream.read(65536):
        await stream.write(piece)


async def relay(*initial: str) -> None:
    async with open_bootstrap(
        identity=None,
        listen=LISTEN,
        initial_peers=initial,
        relay=RelayLimits(),
        progress=lambda line: say(said=line),
    ) as host:
        say(addrs=[addr for addr in host.addrs if "127.0.0.1" not in addr])
        await trio.sleep_forever()


async def server(*initial: str, upnp: bool = False) -> None:
    async with open_membership(create_identity(), HostConfig(listen=LISTEN), initial) as (host, directory, *_):
        host.set_handler(ECHO, echo)

        def changed() -> None:
            say(reach=str(ladder.reach), addrs=[addr for addr in host.addrs if "127.0.0.1" not in addr])

        ladder = Ladder(host, directory, NatConfig(upnp=upnp), changed, lambda line: say(said=line))
        await ladder.run()


async def client(initial: str, *addrs: str) -> None:
    async with open_membership(create_identity(), HostConfig(listen=LISTEN), [initial]) as (host, _, nursery, _):
        peer_id = await host.connect(addrs[0])
        nursery.start_soon(partial(keep_asking, host, peer_id, addrs))
        link = ""
        while True:
            if (now := host.traversal.link(peer_id)) != link:
                link = now
                say(link=link)
            await trio.sleep(0.05)


async def neighbour(swarm: str) -> None:
    lan = LanConfig(swarm=swarm)
    async with open_membership(create_identity(), HostConfig(listen=LISTEN), (), lan) as (host, *_):
        say(peer_id=host.peer_id)
        known: tuple[str, ...] = ()
        while True:
            if (now := host.connected_peers()) != known:
                known = now
                say(neighbours=sorted(now))
            await trio.sleep(0.05)


async def keep_asking(host: Host, peer_id: str, addrs: tuple[str, ...]) -> None:
    """Something is always under way, as in a generation."""
    answers = 0
    while True:
        try:
            with trio.fail_after(10):
                stream = await host.open_stream(peer_id, ECHO, addrs=addrs)  # type: ignore[arg-type]
                await stream.write(PAYLOAD)
                answer = await MessageStream(stream, max_message_bytes=1).read_exactly(len(PAYLOAD))
                await stream.close()
        except (SwarmError, trio.TooSlowError) as error:
            say(lost=str(error))
            continue
        assert answer == PAYLOAD
        answers += 1
        say(answers=answers, link=host.traversal.link(peer_id))  # type: ignore[arg-type]
        await trio.sleep(0.2)


if __name__ == "__main__":
    if "LAB_LOG" in os.environ:
        logging.basicConfig(level=logging.DEBUG)
        logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    else:
        logging.basicConfig(level=logging.INFO)
    roles = {
        "relay": relay,
        "server": server,
        "upnp-server": partial(server, upnp=True),
        "client": client,
        "neighbour": neighbour,
    }
    trio.run(roles[sys.argv[1]], *sys.argv[2:])
