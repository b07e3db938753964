"""A peer that only keeps the directory alive: no model, no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from petals.peer.host import Host, HostConfig
from petals.peer.identity import create_identity, load_or_create_identity
from petals.peer.info import answer_info
from petals.peer.joining import open_membership
from petals.peer.swarm_key import load_swarm_key
from petals.protocols.info import INFO_V1
from petals.protocols.types import PeerId


@asynccontextmanager
async def open_bootstrap(
    *,
    identity: Path | None,
    listen: Sequence[str],
    initial_peers: Sequence[str] = (),
    swarm_key: Path | None = None,
    blocked: frozenset[PeerId] = frozenset(),
    transport: Literal["petals", "stock"] = "petals",
) -> AsyncIterator[Host]:
    """Keep the swarm's directory until the context is left.

    Raises:
        UserError: as `open_peer`.
    """
    own = load_or_create_identity(identity) if identity is not None else create_identity()
    settings = HostConfig(
        listen=tuple(listen), swarm_key=load_swarm_key(swarm_key), blocked=blocked, transport=transport
    )
    async with open_membership(own, settings, initial_peers) as (host, _, _):
        host.set_handler(INFO_V1, partial(answer_info, lambda digest: []))
        yield host
