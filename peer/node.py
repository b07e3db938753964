"""A node of the swarm. `open_peer` owns every task it starts in one nursery: host, directory, server, clients."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from petals.dht.directory import Directory
from petals.dht.records import sign_record
from petals.models.errors import SourceUnreachable
from petals.models.source.checkpoint import Checkpoint, open_checkpoint
from petals.models.source.hub import DEFAULT_HUB_ID
from petals.peer.accounting.ledger import Ledger, ledger_path, read_ledger
from petals.peer.accounting.receipts import Accountant
from petals.peer.base.config import PeerConfig, ServeConfig
from petals.peer.base.identity import Identity, create_identity, load_or_create_identity, verify
from petals.peer.base.portal import Portal
from petals.peer.client.generation.generation import TokenStream, run_generation
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.client.generation.prompts import Prompt
from petals.peer.client.model_client import ClientOptions, ModelClient
from petals.peer.client.routing.view import SwarmWatcher
from petals.peer.membership.clocks import ClockWatch
from petals.peer.membership.complaints import ComplaintBook
from petals.peer.membership.invitation import find_way_in, introduce
from petals.peer.membership.joining import open_membership
from petals.peer.membership.reachability import Ladder
from petals.peer.membership.record_exchange import answer_info
from petals.peer.net.host import Host, HostConfig
from petals.peer.server.service import Server, Service
from petals.peer.server.serving_plan import ServingPlan, choose_place, plan_serving
from petals.peer.weights.fetch import SwarmWeights, find_model
from petals.peer.weights.share import WeightSender
from petals.protocols.inference import INFERENCE_V1
from petals.protocols.info import INFO_V1
from petals.protocols.receipts import RECEIPTS_V1
from petals.protocols.training import BACKWARD_V1, FORWARD_V1
from petals.protocols.types import ModelId, PeerId
from petals.protocols.weights import WEIGHTS_V1

log = logging.getLogger(__name__)

SWARM = "swarm:"
"""In front of a model's digest or name: its weights come from those who serve it."""


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
        complaints: ComplaintBook,
        ledger: Ledger,
    ) -> None:
        self.config = config
        self.host = host
        self.directory = directory
        self.portal = Portal()
        self.asking = ClientOptions()
        """What generations want of the swarm that say nothing else."""
        self.ledger = ledger
        self.clocks = ClockWatch(host, progress)
        self._service: Service | None = None
        self._climbing = False
        self._identity = identity
        self._nursery = nursery
        self.complaints = complaints
        """What is said about servers that answered wrongly."""
        self._progress = progress
        self._checkpoints: dict[tuple[str | None, str | None], Checkpoint] = {}
        self._clients: dict[ModelId, ModelClient] = {}
        self._fetched: dict[str, SwarmWeights] = {}
        """By digest: models whose weights come from the swarm as they are needed."""
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

    def warnings(self) -> list[str]:
        """What people should hear of, in sentences: refused records, a key that is used twice, a wrong clock."""
        return [*self.clocks.sentences(), *self.directory.warnings()]

    async def checkpoint(
        self, model: str | None = None, *, revision: str | None = None, token: str | None = None
    ) -> Checkpoint:
        """Open a model's checkpoint once; None: the one of the configuration, whose revision and token are used too.

        Raises:
            ModelError: one line saying what is wrong with it. UserError: the swarm does not give it.
        """
        name, revision = model or self.config.model, revision or self.config.revision
        token = token or self.config.token
        async with self._opening:
            if (name, revision) not in self._checkpoints:
                self._checkpoints[name, revision] = await self._open(name, revision, token)
            return self._checkpoints[name, revision]

    async def _open(self, name: str | None, revision: str | None, token: str | None) -> Checkpoint:
        if name is not None and name.startswith(SWARM):
            return await self._open_from_swarm(name.removeprefix(SWARM))
        if self.config.weights_from == "swarm":
            return await self._open_from_swarm(name or DEFAULT_HUB_ID)
        opening = partial(open_checkpoint, name, revision=revision, token=token, progress=self._progress)
        try:
            return await trio.to_thread.run_sync(opening)
        except SourceUnreachable as unreachable:
            if self.config.weights_from == "hub" or not self.host.connected_peers():
                raise
            self._progress(f"{unreachable}; asking the swarm")
            return await self._open_from_swarm(name or DEFAULT_HUB_ID)

    async def _open_from_swarm(self, wanted: str) -> Checkpoint:
        model = await find_model(self.host, self.directory, wanted)
        weights = SwarmWeights(self.host, self.directory, model, self._progress)
        checkpoint = await weights.open()
        self._fetched[model.digest] = weights
        return checkpoint

    async def client(self, model: str | None = None) -> ModelClient:
        """The client half for one model; several models share the peer."""
        return await self.client_for(await self.checkpoint(model))

    async def client_for(self, checkpoint: Checkpoint) -> ModelClient:
        """The client half for an open checkpoint."""
        digest = await trio.to_thread.run_sync(lambda: checkpoint.digest)
        model = ModelId(checkpoint.name, digest)
        if digest in self._fetched:
            await self._fetched[digest].fetch_others()
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
                    self._identity,
                    self.complaints,
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
        place = await choose_place(self.directory, checkpoint, named, config)
        if config.blocks is None:
            for line in place.why:
                self._progress(line)
        self._service = service = Service(
            self.host,
            self.directory,
            checkpoint,
            named,
            config,
            self._progress,
            random.random,
            partial(self._bring_blocks, named.digest),
            self.ledger,
            self._identity,
        )
        sender = WeightSender(checkpoint, config, service.admission.admits)
        self._progress(sender.describe())
        self.host.set_handler(WEIGHTS_V1, sender.answer)
        await self._nursery.start(service.run, place.blocks)
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

    async def plan(self, config: ServeConfig, model: str | None = None) -> ServingPlan:
        """What `serve` would hold, and why; nothing is loaded and nobody is told. Raises as `serve`."""
        checkpoint = await self.checkpoint(model)
        named = ModelId(checkpoint.name, await trio.to_thread.run_sync(lambda: checkpoint.digest))
        return await plan_serving(self.directory, checkpoint, named, config)

    async def _bring_blocks(self, digest: str, blocks: range) -> None:
        if digest in self._fetched:
            await self._fetched[digest].fetch_blocks(blocks)

    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        options: GenerationOptions | None = None,
        client: ClientOptions | None = None,
        **fields: Any,
    ) -> TokenStream:
        """Ask the swarm to go on with `prompt` (text, token ids or a `Chat`); iterate over the result for text as it
        comes.

        Cancelling the iteration, or leaving its context, gives all caches back at once.

        Args:
            fields: of `GenerationOptions`, in place of `options`: `max_new_tokens=8`, `json_schema={...}`.
        Raises:
            MissingBlocks: names the blocks nobody holds, after `Timeouts.route_s`.
            UserError: a prompt that does not fit.
        """
        if options is not None and fields:
            raise TypeError(f"give options, or {', '.join(fields)}, not both")
        options = options or GenerationOptions(**fields)
        asked = await self.client(model)
        client = client or self.asking
        await asked.ready(client)
        return await self._nursery.start(run_generation, asked, prompt, options, client)

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
    way_in = find_way_in(
        config.initial_peers, config.swarm_key, config.invitation, peer_id=identity.peer_id, now=time.time()
    )
    ledger = Ledger(identity.peer_id, time.time)
    path = None if config.identity is None else ledger_path(config.identity)
    if path is not None:
        read_ledger(path, ledger)
    settings = HostConfig(
        listen=config.listen,
        announce=config.announce,
        blocked=config.blocked,
        swarm_key=way_in.swarm_key,
        transport=config.transport,
        keep_alive_s=config.keep_alive_s,
        connect_s=config.timeouts.connect_s,
    )
    complaints = ComplaintBook(verify, time.time)
    if way_in.initial_peers:
        say(f"joining the swarm through {len(way_in.initial_peers)} of its peers")
    membership = open_membership(
        identity,
        settings,
        way_in.initial_peers,
        config.lan,
        hear=complaints.hear,
        wait=config.wait_for_initial_peers,
        progress=say,
    )
    async with membership as (host, directory, nursery, contacts):
        if way_in.token is not None:
            host.introduce((INFERENCE_V1, FORWARD_V1, BACKWARD_V1), partial(introduce, host, way_in.token))
        peer = Peer(config, identity, host, directory, nursery, say, complaints, ledger)
        host.set_handler(INFO_V1, partial(answer_info, peer._signed_records, complaints=complaints, charge=host.charge))
        contacts.on_return.append(peer._tell)
        accountant = Accountant(host, identity, ledger, peer._served, peer._is_reciprocal, path)
        host.set_handler(RECEIPTS_V1, accountant.answer)
        nursery.start_soon(accountant.run)
        nursery.start_soon(peer.clocks.run)
        if config.nat.relay is not None:
            peer.climb()
        if config.serve is not None:
            await peer.serve(config.serve)
        try:
            yield peer
        finally:
            accountant.save()
