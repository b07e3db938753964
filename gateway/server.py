"""The server under the door: Starlette on hypercorn's trio worker, in a nursery of the peer's program."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import hypercorn
import trio
from hypercorn.trio import serve

from petals.gateway.app import Gateway
from petals.gateway.config import HttpConfig
from petals.gateway.keys import load_keys
from petals.gateway.offers import open_models
from petals.peer.node import Peer
from petals.protocols.errors import UserError

log = logging.getLogger(__name__)

BACKLOG = 128
IDLE_S = 15.0
"""How long a connection may ask nothing; a request's head must have arrived by then, too."""
GOODBYE_S = 3.0


class Door:
    """An address that is ours, and who may come in. Nobody is answered yet: what can be wrong with a door is known
    before a model has been loaded for it. Leaving the context gives the address back.

    Raises:
        UserError: the address can not be listened on, or the API keys can not be read.
    """

    def __init__(self, config: HttpConfig) -> None:
        self.config = config
        self.keys = None if config.api_keys is None else load_keys(config.api_keys)
        self.socket = listen(config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@asynccontextmanager
async def open_gateway(peer: Peer, door: Door | HttpConfig) -> AsyncIterator[str]:
    """Answer HTTP while the context is open; yields the URL. Answers still running when it is left are cut off.

    Raises:
        UserError: as `Door`, or somebody else listens there by now.
        ModelError: a model that can not be opened.
    """
    if isinstance(door, HttpConfig):
        with Door(door) as made:
            async with open_gateway(peer, made) as url:
                yield url
        return
    gateway = Gateway(peer, door.config, await open_models(peer, door.config), door.keys)
    app = gateway.app()
    try:
        door.socket.listen(BACKLOG)
    except OSError as error:
        raise _refused(door.config, error) from None
    host, port = door.socket.getsockname()[:2]
    settings = hypercorn.Config()
    settings.bind = [f"fd://{door.socket.detach()}"]  # hypercorn closes it
    settings.errorlog = log
    settings.include_server_header = False
    settings.keep_alive_timeout = IDLE_S
    settings.graceful_timeout = GOODBYE_S
    settings.backlog = BACKLOG
    application: Any = app
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gateway.history.run)
        await nursery.start(serve, application, settings)
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        nursery.cancel_scope.cancel()


def listen(config: HttpConfig) -> socket.socket:
    """A bound socket. A client that stops reading would hold its answer, and caches at every server, for ever: the
    system is told to give such connections up.

    Raises:
        UserError: the address is not ours, or somebody else listens there.
    """
    host, port = config.address
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * config.stalled_s))
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise _refused(config, error) from None
    return listener


def _refused(config: HttpConfig, error: OSError) -> UserError:
    advice = {
        errno.EADDRINUSE: "; another program has that port: give another, such as --http 127.0.0.1:8001, or :0 for any",
        errno.EACCES: "; ports below 1024 are the administrator's: give another, such as --http 127.0.0.1:8000",
        errno.EADDRNOTAVAIL: "; this machine has no such address: 127.0.0.1 is itself, 0.0.0.0 are all it has",
    }
    return UserError(f"can not listen on {config.bind}: {error.strerror or error}{advice.get(error.errno or 0, '')}")
