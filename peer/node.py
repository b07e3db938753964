"""A node of the swarm. `open_peer` owns every task it starts in one nursery: host, directory, server, clients."""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from petals.dht.directory import Directory
from petals.dht.records import ServerState, sign_record
from petals.models.checkpoint import Checkpoint, open_checkpoint
from petals.peer.client.generation import GenerationOptions, Prompt, TokenStream, run_generation
from petals.peer.client.model_client import ClientOptions, ModelClient
from petals.peer.client.view import SwarmWatcher
from petals.peer.config import PeerConfig, ServeConfig
from petals.peer.host import Host, HostConfig
from petals.peer.identity import Identity, create_identity, load_or_create_identity
from petals.peer.info import answer_info
from petals.peer.joining import open_membership
from petals.peer.ledger import Ledger, ledger_path, read_ledger
from petals.peer.portal import Portal
from petals.peer.reachability import Ladder
from petals.peer.receipts import Accountant
from petals.peer.server.capacity import capacity_of
from petals.peer.server.placement import choose_blocks
from petals.peer.server.service import Server, Service, check_blocks
from petals.protocols.errors import UserError
from petals.protocols.info import INFO_V1
from petals.protocols.receipts import RECEIPTS_V1
from petals.protocols.types import ModelId, PeerId

log = logging.getLogger(__name__)


class Peer:
    """An open peer. Made by `open_peer`; everything it starts ends with that context."""

    def __init__(
        self,
        config: PeerConfig,
        identity: Identity,
        host: Host,
        directory: Directory,
        nursery: trio.Nursery,
        progress: Callable[[str], None],
        ledger: Ledger,
    ) -> None:
        self.config = config
        self.host = host
        self.directory = directory
        self.portal = Portal()
        self.ledger = ledger
        self._service: Service | None = None
        self._climbing = False
        self._identity = identity
        self._nursery = nursery
        self._progress = progress
        self._checkpoints: dict[tuple[str | None, str | None], Checkpoint] = {}
        self._clients: dict[ModelId, ModelClient] = {}
        self._opening = trio.Lock()

    @property
    def server(self) -> Server | None:
        """What answers others now; None: nothing, or it is being loaded."""
        return None if self._service is None else self._service.server

    @property
    def peer_id(self) -> PeerId:
        return self.host.peer_id

    @property
    def addrs(self) -> tuple[str, ...]:
        """Full multiaddrs another peer may pass as `initial_peers`."""
        return self.host.addrs

    async def checkpoint(
        self, model: str | None = None, *, revision: str | None = None, token: str | None = None
    ) -> Checkpoint:
        """Open a model's checkpoint once; None: the one of the configuration, whose revision and token are used too.

        Raises:
            ModelError: one line saying what is wrong with it.
        """
        name, revision = model or self.config.model, revision or self.config.revision
        token = token or self.config.token
        async with self._opening:
            if (name, revision) not in self._checkpoints:
                opening = partial(open_checkpoint, name, revision=revision, token=token, progress=self._progress)
                self._checkpoints[name, revision] = await trio.to_thread.run_sync(opening)
            return self._checkpoints[name, revision]

    async def client(self, model: str | None = None) -> ModelClient:
        """The client half for one model; several models share the peer."""
        return await self.client_for(await self.checkpoint(model))

    async def client_for(self, checkpoint: Checkpoint) -> ModelClient:
        """The client half for an open checkpoint."""
        digest = await trio.to_thread.run_sync(lambda: checkpoint.digest)
        model = ModelId(checkpoint.name, digest)
        async with self._opening:  # two first questions at once share one watcher
            if model not in self._clients:
                watcher = SwarmWatcher(self.host, self.directory, model, update_s=self.config.update_s)
                await self._nursery.start(watcher.run)
                self._clients[model] = ModelClient(
                    self.host,
                    self.portal,
                    checkpoint,
                    model,
                    watcher,
                    self.config.timeouts,
                    random.random,
                    self._progress,
                    self._nursery,
                    self.ledger.took,
                )
            return self._clients[model]

    async def serve(self, config: ServeConfig, model: str | None = None) -> Server:
        """Load blocks and serve them until the peer is closed; returns once the swarm has been told.

        Raises:
            UserError: a range that the model does not have. ModelError: blocks that can not be loaded.
        """
        checkpoint = await self.checkpoint(model)
        named = ModelId(checkpoint.name, await trio.to_thread.run_sync(lambda: checkpoint.digest))
        blocks = config.blocks or await self._choose_blocks(checkpoint, named, config)
        check_blocks(blocks, checkpoint)
        self._service = service = Service(
            self.host, self.directory, checkpoint, named, config, self._progress, random.random, self.ledger
        )
        await self._nursery.start(service.run, blocks)
        assert service.server is not None
        self.climb()
        return service.server

    def climb(self) -> None:
        """Find out how others reach this peer, and let them (reachability.py); goes on until the peer is closed."""
        if not self._climbing and self.config.transport == "petals":
            self._climbing = True
            ladder = Ladder(self.host, self.directory, self.config.nat, self._tell, self._progress)
            self._nursery.start_soon(ladder.run)

    def _tell(self) -> None:
        if self._service is not None:
            self._nursery.start_soon(self._service.announcer.renew)

    async def _choose_blocks(self, checkpoint: Checkpoint, model: ModelId, config: ServeConfig) -> range:
        if config.num_blocks is not None:
            capacity = config.num_blocks
        else:
            capacity, why = await trio.to_thread.run_sync(capacity_of, checkpoint, config)
            self._progress(why)
        if not 0 < capacity <= checkpoint.num_blocks:
            raise UserError(f"{checkpoint.name} has {checkpoint.num_blocks} blocks; {capacity} is not a number of them")
        records = [record for record in await self.directory.lookup(model) if record.state is not ServerState.OFFLINE]
        # Before anything is loaded nothing is measured: an average server of this swarm is assumed.
        speeds = [record.inference_rps for record in records if record.inference_rps > 0]
        return choose_blocks(records, checkpoint.num_blocks, capacity, statistics.mean(speeds) if speeds else 1.0)

    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        options: GenerationOptions | None = None,
        client: ClientOptions | None = None,
    ) -> TokenStream:
        """Ask the swarm to go on with `prompt` (text, token ids or a `Chat`); iterate over the result for text as it
        comes.

        Cancelling the iteration, or leaving its context, gives all caches back at once.

        Raises:
            MissingBlocks: names the blocks nobody holds, after `Timeouts.route_s`.
            UserError: a prompt that does not fit.
        """
        asked = await self.client(model)
        await asked.ready()
        return await self._nursery.start(
            run_generation, asked, prompt, options or GenerationOptions(), client or ClientOptions()
        )

    def _served(self) -> tuple[ModelId, range] | None:
        return None if self.server is None else (self.server.model, self.server.span.blocks)

    def _is_reciprocal(self) -> bool:
        return self._service is not None and self._service.reciprocal

    def _signed_records(self, digest: str) -> list[bytes]:
        if self._service is None or digest not in ("", self._service.model.digest):
            return []
        record = self._service.announcer.record()
        return [sign_record(record, self._identity.sign, self._identity.public_key)]


@asynccontextmanager
async def open_peer(
    config: PeerConfig | None = None, *, progress: Callable[[str], None] | None = None
) -> AsyncIterator[Peer]:
    """Run a peer until the context is left. Roles come from the configuration, or later from the peer's methods.

    Args:
        progress: told in one line what long work is being done.
    Raises:
        UserError: a key that can not be read, a port in use, an initial peer that can not be reached.
        ModelError: blocks to serve that can not be loaded.
    """
    config = config or PeerConfig()
    say = progress or log.info
    identity = load_or_create_identity(config.identity) if config.identity is not None else create_identity()
    ledger = Ledger(identity.peer_id, time.time)
    path = None if config.identity is None else ledger_path(config.identity)
    if path is not None:
        read_ledger(path, ledger)
    settings = HostConfig(
        listen=config.listen,
        announce=config.announce,
        transport=config.transport,
        keep_alive_s=config.keep_alive_s,
        connect_s=config.timeouts.connect_s,
    )
    async with open_membership(identity, settings, config.initial_peers) as (host, directory, nursery):
        peer = Peer(config, identity, host, directory, nursery, say, ledger)
        host.set_handler(INFO_V1, partial(answer_info, peer._signed_records))
        accountant = Accountant(host, identity, ledger, peer._served, peer._is_reciprocal, path)
        host.set_handler(RECEIPTS_V1, accountant.answer)
        nursery.start_soon(accountant.run)
        if config.nat.relay is not None:
            peer.climb()
        if config.serve is not None:
            await peer.serve(config.serve)
        try:
            yield peer
        finally:
            accountant.save()
