"""A peer that only keeps the directory alive: no model, no torch."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from petals.peer.host import Host, HostConfig
from petals.peer.identity import create_identity, load_or_create_identity
from petals.peer.info import answer_info
from petals.peer.invitation import find_way_in
from petals.peer.joining import open_membership
from petals.protocols.info import INFO_V1
from petals.protocols.types import PeerId


@asynccontextmanager
async def open_bootstrap(
    *,
    identity: Path | None,
    listen: Sequence[str],
    initial_peers: Sequence[str] = (),
    swarm_key: Path | None = None,
    invitation: str | None = None,
    blocked: frozenset[PeerId] = frozenset(),
    transport: Literal["petals", "stock"] = "petals",
) -> AsyncIterator[Host]:
    """Keep the swarm's directory until the context is left.

    Raises:
        UserError: as `open_peer`.
    """
    own = load_or_create_identity(identity) if identity is not None else create_identity()
    way_in = find_way_in(initial_peers, swarm_key, invitation, now=time.time())
    settings = HostConfig(listen=tuple(listen), swarm_key=way_in.swarm_key, blocked=blocked, transport=transport)
    async with open_membership(own, settings, way_in.initial_peers) as (host, _, _):
        host.set_handler(INFO_V1, partial(answer_info, lambda digest: []))
        yield host
