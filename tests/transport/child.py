"""A peer in a process of its own, to be frozen and killed: prints its address, echoes, and holds streams open."""

from __future__ import annotations

import trio
from libp2p.crypto.ed25519 import create_new_key_pair

from petals.peer.net.host import HostConfig, open_host
from petals.protocols.stream import ByteStream


async def echo(stream: ByteStream) -> None:
    while piece := await stream.read(65536):
        await stream.write(piece)


async def main() -> None:
    async with open_host(create_new_key_pair(), HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))) as host:
        host.set_handler("/test/echo/1", echo)
        print(host.addrs[0], flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main)
