"""A peer's life with every logger at its loudest and every secret in use; tests/test_secrets.py reads what it says.

python tests/secrets_child.py DIRECTORY HUB_TOKEN   (keys and hashes lie in DIRECTORY)
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
from pathlib import Path

logging.basicConfig(level=1, stream=sys.stderr)
HUB = socket.create_server(("127.0.0.1", 0))
os.environ |= {"HF_HUB_VERBOSITY": "debug", "HF_ENDPOINT": f"http://127.0.0.1:{HUB.getsockname()[1]}"}

ROOM, TOKEN = Path(sys.argv[1]), sys.argv[2]


def main() -> None:
    import httpx
    import trio

    from benchmarks.soak import make_model
    from petals import PeerConfig, ServeConfig, open_peer
    from petals.gateway.config import HttpConfig
    from petals.gateway.server import open_gateway
    from petals.models.errors import ModelError
    from petals.peer.base.identity import IdentityError, load_identity
    from petals.protocols.errors import UserError

    model = ROOM / "model"
    make_model(model)
    for name in list(logging.root.manager.loggerDict):
        logging.getLogger(name).setLevel(1)
    api_key = (ROOM / "api.key").read_text()

    async def live() -> None:
        serving = PeerConfig(
            model=str(model), identity=ROOM / "server.key", token=TOKEN, serve=ServeConfig(throughput=1.0)
        )
        async with open_peer(serving) as server:
            asking = PeerConfig(model=str(model), identity=ROOM / "client.key", token=TOKEN, initial_peers=server.addrs)
            print(repr(serving), repr(asking), server._identity, vars(server))
            async with (
                open_peer(asking) as client,
                open_gateway(client, HttpConfig(bind="127.0.0.1:0", api_keys=ROOM / "api_keys")) as url,
                httpx.AsyncClient(base_url=url, timeout=60) as http,
            ):
                for key in (api_key, api_key[:-1] + "x"):
                    headers = {"authorization": f"Bearer {key}"}
                    body = {"model": "model", "prompt": [5, 6, 7], "max_tokens": 4}
                    answer = await http.post("/v1/completions", json=body, headers=headers)
                    print(answer.status_code, answer.text)
                answer = await http.post(
                    "/v1/completions", content=b"{", headers={"authorization": f"Bearer {api_key}"}
                )
                print(answer.status_code, answer.text)
                await answer_401(client)
                server.host.set_handler("/broken/1.0.0", broken)
                try:
                    stream = await client.host.open_stream(server.peer_id, "/broken/1.0.0")
                    await stream.read(1)
                except Exception:
                    traceback.print_exc()

    async def broken(stream: object) -> None:
        raise RuntimeError(f"a bug, with {serving_repr}")

    async def answer_401(client: object) -> None:
        """A hub that knows nobody, asked for a model with the token."""
        asked: list[bytes] = []

        async def hub(stream: trio.SocketStream) -> None:
            asked.append(await stream.receive_some(65536))
            await stream.send_all(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

        HUB.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(HUB))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, hub, [listener])
            try:
                await client.checkpoint("somebody/something", token=TOKEN)  # type: ignore[attr-defined]
            except (ModelError, UserError):  # neither the hub nor the swarm has it
                traceback.print_exc()
            nursery.cancel_scope.cancel()
        print("the hub was told the token:", any(TOKEN.encode() in request for request in asked))

    serving_repr = repr(PeerConfig(token=TOKEN))
    damaged = ROOM / "damaged.key"
    damaged.write_bytes((ROOM / "server.key").read_bytes()[:-9])
    try:
        load_identity(damaged)
    except IdentityError:
        traceback.print_exc()
    trio.run(live)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
