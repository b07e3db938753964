"""A peer that only keeps the directory alive: no model, no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from petals.dht.directory import open_directory
from petals.peer.host import Host, HostConfig, open_host
from petals.peer.identity import create_identity, load_or_create_identity, verify
from petals.peer.info import answer_info
from petals.peer.joining import join
from petals.protocols.info import INFO_V1


@asynccontextmanager
async def open_bootstrap(
    *,
    identity: Path | None,
    listen: Sequence[str],
    initial_peers: Sequence[str] = (),
    transport: Literal["petals", "stock"] = "petals",
) -> AsyncIterator[Host]:
    """Keep the swarm's directory until the context is left.

    Raises:
        UserError: as `open_peer`.
    """
    own = load_or_create_identity(identity) if identity is not None else create_identity()
    raised: Exception | None = None
    async with open_host(own.key_pair, HostConfig(listen=tuple(listen), transport=transport)) as host:
        host.set_handler(INFO_V1, partial(answer_info, lambda digest: []))
        await join(host, initial_peers)
        async with open_directory(host, own, verify):
            try:
                yield host
            except Exception as error:  # kept, not handled: raised again below, outside of the nurseries
                raised = error
    if raised is not None:
        raise raised
