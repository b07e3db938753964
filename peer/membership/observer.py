"""What a swarm looks like to somebody who only looks: which models, who holds what. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from petals.dht.directory import Directory
from petals.dht.health import copies_of, health, weakest_stretch
from petals.dht.records import RecordError, ServerRecord, open_record
from petals.peer.accounting.ledger import Ledger, ledger_path, read_ledger
from petals.peer.base.concurrency import gather
from petals.peer.base.identity import create_identity, load_identity, verify
from petals.peer.membership.invitation import find_way_in
from petals.peer.membership.joining import open_membership
from petals.peer.membership.record_exchange import fetch_record
from petals.peer.net.host import Host, HostConfig
from petals.protocols.errors import UserError
from petals.protocols.types import ModelId, PeerId

ANY_MODEL = ModelId("", "")


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model's swarm."""

    model: ModelId
    records: tuple[ServerRecord, ...]
    """By first block, then by peer ID."""
    links: Mapping[PeerId, str] = field(default_factory=dict)
    """How we are connected with them (Host.link)."""

    @property
    def num_blocks(self) -> int:
        """Of the whole model, as its servers say; at least as many as are held."""
        return max((max(record.num_blocks, record.blocks.stop) for record in self.records), default=1)

    @property
    def copies(self) -> list[int]:
        return copies_of(self.records, self.num_blocks)

    @property
    def weakest(self) -> range:
        return weakest_stretch(self.copies)

    @property
    def health(self) -> tuple[str, str]:
        return health(self.copies)


class SwarmObserver:
    """Asks again whenever `look` is called; made by `open_observer`."""

    def __init__(self, host: Host, directory: Directory) -> None:
        self._host = host
        self._directory = directory
        self._models: dict[str, ModelId] = {}

    async def look(self) -> list[ModelStatus]:
        """All models that the peers we know serve, or served when we last looked.

        Raises:
            UserError: nobody serves anything.
        """
        await self._find_models()
        if not self._models:
            await self._directory.refresh()  # the initial peers may only keep the directory: meet those they know
            await self._find_models()
        if not self._models:
            known = self.warnings()
            advice = ". ".join(known) if known else "give --initial_peers the address of a peer that does"
            raise UserError(f"nobody there serves a model; {advice}")
        found = []
        for model in sorted(self._models.values(), key=lambda model: model.name):
            records = await self._directory.lookup(model)
            by_place = sorted(records, key=lambda record: (record.blocks.start, record.peer_id))
            links = {record.peer_id: self._host.link(record.peer_id) for record in records}
            found.append(ModelStatus(model, tuple(by_place), links))
        return found

    def warnings(self) -> list[str]:
        """What people should hear of, in sentences: records that were refused while looking."""
        return self._directory.warnings()

    async def _find_models(self) -> None:
        peers = self._host.connected_peers()
        calls = [partial(fetch_record, self._host, peer, (), ANY_MODEL) for peer in peers]
        for peer, data in zip(peers, await gather(calls), strict=True):
            if isinstance(data, bytes):
                try:
                    record = open_record(data, now=time.time(), verify=verify)
                except RecordError as error:
                    self._directory.refusals.note(peer, error, fresh=True)
                    continue
                self._models[record.model.digest] = record.model


def read_contribution(identity: Path) -> dict[str, Any]:
    """What the peer with this key file gave and took, as its ledger says.

    Raises:
        UserError: there is no such file, or it is no ledger.
    """
    ledger, path = Ledger(load_identity(identity).peer_id, time.time), ledger_path(identity)
    if not read_ledger(path, ledger):
        raise UserError(f"there is no ledger {path} yet; a peer with --identity {identity} writes it every minute")
    described = ledger.describe()
    del described["receipts"], described["rejected"]  # of a process
    return described


@asynccontextmanager
async def open_observer(
    initial_peers: Sequence[str], *, swarm_key: Path | None = None, invitation: str | None = None
) -> AsyncIterator[SwarmObserver]:
    """A nameless peer that serves nothing.

    Raises:
        UserError: no initial peer answers, no swarm key is in the file, or the invitation does not hold.
    """
    way_in = find_way_in(initial_peers, swarm_key, invitation, now=time.time())
    settings = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), swarm_key=way_in.swarm_key)
    async with open_membership(create_identity(), settings, way_in.initial_peers) as (host, directory, _, _):
        yield SwarmObserver(host, directory)
