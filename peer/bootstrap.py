"""A peer that only keeps the directory alive: no model, no torch."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from petals.peer.complaints import ComplaintBook
from petals.peer.host import Host, HostConfig
from petals.peer.identity import create_identity, load_or_create_identity, verify
from petals.peer.info import answer_info
from petals.peer.joining import open_membership
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
    settings = HostConfig(listen=tuple(listen), transport=transport)
    async with open_membership(own, settings, initial_peers) as (host, _, _):
        host.set_handler(INFO_V1, partial(answer_info, lambda digest: [], complaints=ComplaintBook(verify, time.time)))
        yield host
