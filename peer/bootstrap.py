"""A peer that only keeps the directory alive: no model, no torch."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from petals.peer.base.config import LanConfig, NatConfig, RelayLimits
from petals.peer.base.identity import create_identity, load_or_create_identity, verify
from petals.peer.membership.complaints import ComplaintBook
from petals.peer.membership.invitation import find_way_in
from petals.peer.membership.joining import open_membership
from petals.peer.membership.reachability import Ladder
from petals.peer.membership.record_exchange import answer_info
from petals.peer.net.host import Host, HostConfig
from petals.protocols.info import INFO_V1
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)


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
    relay: RelayLimits | None = None,
    lan: LanConfig | None = None,
    wait: bool = False,
    progress: Callable[[str], None] = log.info,
) -> AsyncIterator[Host]:
    """Keep the swarm's directory until the context is left.

    Args:
        lan: join peers on the local network.
        relay: be a relay as well, within these limits.
        wait: for an initial peer when none answers, however long that takes.
        progress: reports in one line how others reach this peer, and initial peers that are lost or back.

    Raises:
        UserError: as `open_peer`.
    """
    own = load_or_create_identity(identity) if identity is not None else create_identity()
    way_in = find_way_in(initial_peers, swarm_key, invitation, now=time.time())
    settings = HostConfig(listen=tuple(listen), swarm_key=way_in.swarm_key, blocked=blocked, transport=transport)
    membership = open_membership(own, settings, way_in.initial_peers, lan, wait=wait, progress=progress)
    async with membership as (host, directory, nursery, _):
        if relay is not None:
            ladder = Ladder(host, directory, NatConfig(relay=relay), _nobody_to_tell, progress)
            nursery.start_soon(ladder.run)
        book = ComplaintBook(verify, time.time)
        host.set_handler(INFO_V1, partial(answer_info, lambda digest: [], complaints=book, charge=host.charge))
        yield host


def _nobody_to_tell() -> None:
    """A peer that announces nothing has nothing to announce anew."""
