"""One model as this peer's client sees it: the view of its swarm, and everything opened over it."""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import torch
import trio
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from petals.dht.records import ServerRecord
from petals.models.blocks.adapters import Lora
from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.decoding import ignored_settings
from petals.models.client.distributed import Head, HeadQuant, load_model
from petals.models.client.tuning import Tuning
from petals.models.errors import ModelError
from petals.models.source.checkpoint import Checkpoint
from petals.peer.accounting.ledger import nobody_counts
from petals.peer.base.config import Timeouts
from petals.peer.base.config_checks import NOT_NEGATIVE, POSITIVE, SHARE, check_fields, refuse
from petals.peer.base.identity import Identity, verify
from petals.peer.base.portal import Portal
from petals.peer.client.async_model import AsyncTwins
from petals.peer.client.audit.audit import Office, SessionAudit
from petals.peer.client.audit.verdicts import Finding, Trust
from petals.peer.client.constraints import MaskMaker
from petals.peer.client.hops.hop import Hop, SessionSpec
from petals.peer.client.live_options import READ_WHEN_OPENED, LiveOptions
from petals.peer.client.remote_chain import RemoteChain
from petals.peer.client.routing.local_blocks import Home, check_local, is_home, leg_of, name_of, split
from petals.peer.client.routing.routing import Route, RouteChoice, RouteHop, find_route, push_pays, why_not
from petals.peer.client.routing.view import SwarmWatcher
from petals.peer.client.sequence_manager import RemoteSequenceManager
from petals.peer.client.session.recovery import RecoveryOptions
from petals.peer.client.session.session import RemoteSession, SessionOptions, StepTrace
from petals.peer.client.training import BatchTrainer, Companions
from petals.peer.membership.complaints import ComplaintBook
from petals.peer.membership.record_exchange import fetch_record
from petals.peer.net.host import Host
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import RemoteError, RouteError
from petals.protocols.evidence import Complaint, SignedAnswer, sign_complaint
from petals.protocols.tensors import COMPRESSIONS, FLOATS_BY_NAME
from petals.protocols.types import ModelId, PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """What a client wants of its servers."""

    allowed_servers: frozenset[PeerId] | None = None
    blocked_servers: frozenset[PeerId] = frozenset()
    max_retries: float = 10
    """Failures in a row that one step, or one span of a batch, may survive; math.inf: any number."""
    compression: Literal["none", "float16", "int8"] = "none"
    """none (exact), float16 or int8: how hidden states travel."""
    head_quant: HeadQuant = "none"
    """none (exact) or int8: how the language model's head is held here. On a CPU that is a quarter of the bytes to read
    for every token, and logits that are rounded as a server's int8 blocks round."""
    active_adapter: str | None = None
    """Only servers that host this LoRA adapter, which is then applied."""
    local_blocks: tuple[range, ...] = ()
    """Blocks that are computed here and never asked of anybody: with the first and last ones among them, what is said
    and answered does not leave this machine, not even as the hidden states next to it."""
    audit: float = 0.0
    """The probability with which an answer of a server is computed again by another one, beside the session, and
    compared (audit.py). What servers have kept from earlier sessions can not be checked, and is not used then."""
    audit_at_home: bool = False
    """Compute the audited blocks here where nobody else holds them, and where two servers disagree: loads them."""
    require_dtype: str | None = None
    """Only servers that compute in this dtype without quantisation; None: any."""
    exact_recovery: bool = True
    """After a fail-over even the logits are the same to the last bit; False: the same up to rounding, and sooner
    (docs/failover.md has the figures)."""
    use_server_to_server: bool | None = None
    """Let servers push activations to each other; they fall back to us where they cannot reach each other. None: where
    that is sooner, which it is not on one machine or a quick local network."""
    standby: bool = False
    """Keep a second server ready for every hop, told the same a little later: a failure costs a round trip instead of a
    replay, and all the time a second lease and the compute again."""
    prefix_cache: bool = True
    """Of `Peer.generate`: let servers keep the caches of a finished generation for a while, and begin with what they
    still have of the prompt: the second question of a chat costs its new tokens only."""
    request_timeout: float | None = None
    """Seconds for one step at one server, or one span of a batch; None: the peer's `Timeouts`."""
    on_step: Callable[[StepTrace], None] | None = None
    """Told, in the trio thread, of every step of a session where its time went (tracing.py)."""
    show_route: bool = False
    """Say which servers a session goes through, and how long each takes."""

    def __post_init__(self) -> None:
        check_fields(self, {"max_retries": NOT_NEGATIVE, "audit": SHARE, "request_timeout": POSITIVE})
        if any(blocks.step != 1 or not 0 <= blocks.start < blocks.stop for blocks in self.local_blocks):
            refuse(self, "local_blocks", "ranges of at least one block, such as (range(0, 2), range(28, 30))")


LIVE_OPTIONS = frozenset(each.name for each in fields(ClientOptions)) - READ_WHEN_OPENED
"""Options that `model.config` may change while a model is open."""
COMPLAINT_S = 6 * 3600.0
"""How long a complaint of ours holds."""
TOLD = 8
"""Servers that are told of it."""
DETOUR = 2.0
"""How many times the best route's step a route may take that goes to those who have the beginning already."""
REMEMBERED_NAMES = 4096


@dataclass(frozen=True, slots=True)
class Prefix:
    """The beginning of a sequence, whose caches servers may still have from an earlier session."""

    names: tuple[bytes, ...]
    """protocols/prefixes.py"""
    inputs: Callable[[], Tensor]
    """What enters the first block, (1, at least the named tokens, hidden_size); called in a thread, if at all."""


class ModelClient:
    """Asks the swarm of one model. Made by `Peer.client`; lives as long as the peer."""

    def __init__(
        self,
        host: Host,
        portal: Portal,
        checkpoint: Checkpoint,
        model: ModelId,
        watcher: SwarmWatcher,
        timeouts: Timeouts,
        random: Callable[[], float],
        say: Callable[[str], None],
        nursery: trio.Nursery,
        identity: Identity,
        complaints: ComplaintBook,
        took: Callable[[PeerId, int], None] = nobody_counts,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.watcher = watcher
        self.portal = portal
        self._host = host
        self._language_models: dict[tuple[torch.dtype, HeadQuant], tuple[Any, PreTrainedTokenizerBase]] = {}
        self._loading = trio.Lock()
        self.masks = MaskMaker()
        """Of answers that must match something."""
        self._timeouts = timeouts
        self._random = random
        self._say = say
        self._nursery = nursery
        self._home = Home(host, checkpoint, model, say)
        self._at_home = False
        self.trust = Trust(partial(complaints.accusers, besides=identity.peer_id))
        """What audits have found."""
        self._identity = identity
        self._complaints = complaints
        self._audits: set[SessionAudit] = set()
        self._took = took
        self._left: OrderedDict[bytes, frozenset[PeerId]] = OrderedDict()
        """Who was left with the cache of a named prefix, the latest last."""

    @property
    def blocks(self) -> range:
        return range(self.checkpoint.num_blocks)

    async def open_session(
        self,
        blocks: range,
        batch_size: int,
        max_length: int,
        options: ClientOptions | None = None,
        lora: Lora | None = None,
        prefix: Prefix | None = None,
    ) -> RemoteSession:
        """Caches of `batch_size` x `max_length` tokens over `blocks`, leased on a route; `lora` as `BlockChain` has it.

        Args:
            prefix: the session's position is behind as much of it as all servers of the route still have.
        Raises:
            MissingBlocks: names the blocks nobody holds, after `Timeouts.route_s`.
            RemoteError: those who hold them refuse.
        """
        options = options or ClientOptions()
        await self._hold(options)
        spec = SessionSpec(
            model=self.model,
            hidden_size=self.checkpoint.hidden_size,
            batch_size=batch_size,
            max_length=max_length,
            adapter=options.active_adapter or "",
            lora=lora,
            encoding=COMPRESSIONS[options.compression],
            prefixes=() if prefix is None or options.audit else prefix.names,
            took=self._count,
        )

        async def prefix_inputs(block: int, tokens: int) -> Tensor:
            assert prefix is not None
            hidden = (await trio.to_thread.run_sync(prefix.inputs))[:, :tokens]
            if block == blocks.start:
                return hidden
            output, _ = await self._trainer(options).forward(hidden, Companions(blocks=range(blocks.start, block)))
            return output

        last: list[tuple[Route, frozenset[PeerId]]] = []

        familiar = None if prefix is None or options.audit else self._who_has(prefix.names)

        def find(blocks: range, avoid: frozenset[PeerId]) -> Route:
            route = self._latency_route(options, batch_size, max_length, blocks, avoid)
            if familiar is not None and not avoid:
                with suppress(RouteError):
                    known = self._latency_route(options, batch_size, max_length, blocks, avoid, among=familiar)
                    route = known if known.expected_s <= DETOUR * route.expected_s else route
            last[:] = [(route, avoid)]
            return route

        session = RemoteSession(
            self._home,
            self.watcher,
            blocks,
            spec,
            self._deadlines(options),
            find,
            SessionOptions(
                recovery=RecoveryOptions(
                    max_retries=options.max_retries, exact=options.exact_recovery, prefix_inputs=prefix_inputs
                ),
                push=options.use_server_to_server is not False,
                push_pays=self._push_pays if options.use_server_to_server is None else lambda before, after: True,
                standby_in=self._nursery if options.standby else None,
                on_step=options.on_step,
                audit=partial(self._audit, options) if options.audit else None,
                audit_in=self._nursery,
            ),
        )
        try:
            await session.open()
        except BaseException:
            await session.reset()
            raise
        session.choice = self._explain(options, batch_size, max_length, blocks, *last[0])
        if options.show_route:
            route, skipped = session.choice.route, session.choice.skipped
            self._say(f"Route found: {route.describe()}; {1e3 * route.expected_s:.1f} ms a token expected")
            for each in skipped:
                self._say(f"Not used: {each.describe()}")
        return session

    def _audit(self, options: ClientOptions, doubt: Callable[[int], None]) -> SessionAudit:
        office = Office(
            trust=self.trust,
            dice=self._random,
            verify=verify,
            open_hop=self._open_auditor,
            liars=lambda: self.watcher.liars,
            report=self.watcher.report,
            precision_of=self._precision_of,
            complain=self._complain,
            say=self._say,
        )
        at_home = self._hold_for_audit if options.audit_at_home else None
        self._audits = {audit for audit in self._audits if not audit.done.is_set()}
        audit = SessionAudit(office, options.audit, partial(self._auditors, options), at_home, doubt)
        self._audits.add(audit)
        return audit

    async def audited(self) -> Trust:
        """Wait until nothing of the sessions that have ended waits for its audit any more; bounded."""
        for audit in list(self._audits):
            if audit.ended:
                await audit.done.wait()
        return self.trust

    async def _open_auditor(self, leg: RouteHop, spec: SessionSpec) -> Hop:
        return await Hop.open(self._home, leg.peer_id, leg.addrs, leg.blocks, spec, self._timeouts)

    def _precision_of(self, peer_id: PeerId) -> tuple[str, str] | None:
        records = (offer.record for offer in self.watcher.view.offers)
        return next(((each.dtype, each.quant_type) for each in records if each.peer_id == peer_id), None)

    def _auditors(self, options: ClientOptions, hop: Hop, avoid: frozenset[PeerId]) -> Route:
        """Who else computes these blocks in this precision; chosen by dice, so that nobody can wait for the part."""
        alike = {
            offer.record.peer_id: offer.record.blocks
            for offer in self.watcher.view.offers
            if FLOATS_BY_NAME.get(offer.record.dtype) is hop.dtype and offer.record.quant_type == hop.quant_type
        }
        whole = {
            peer_id
            for peer_id, held in alike.items()
            if peer_id not in avoid and held.start <= hop.blocks.start and hop.blocks.stop <= held.stop
        }
        # In a row of servers what travels between them would be rounded, where it is: then one must do it alone.
        exact = hop.spec.encoding == pb.RAW == hop.encoding
        among = frozenset(whole or (alike if exact else ()))
        return find_route(
            self.watcher.view,
            hop.blocks,
            mode="throughput",
            rng=self._random,
            allowed=among if options.allowed_servers is None else among & options.allowed_servers,
            blocked=options.blocked_servers | avoid | self.watcher.liars,
            adapter=options.active_adapter,
        )

    async def _hold_for_audit(self, hop: Hop) -> Route:
        dtype = str(hop.dtype).removeprefix("torch.")
        name = name_of(hop.blocks, f"-{dtype}-{hop.quant_type}")
        try:
            await self._hold_as(name, hop.blocks, hop.dtype, hop.quant_type)
        except ModelError as error:  # no copy of these blocks here, or no room
            raise RouteError(f"not computed at home: {error}") from None
        return Route((replace(leg_of(hop.blocks, hop.blocks), peer_id=name),))

    def _complain(self, answer: SignedAnswer, others: tuple[SignedAnswer, ...], finding: Finding) -> None:
        """Keep a complaint, and tell some servers, who tell others."""
        now = time.time()
        complaint = Complaint(
            accuser=self._identity.peer_id,
            answer=answer,
            others=others,
            error=min(finding.error, sys.float_info.max),
            tolerance=finding.tolerance,
            issued_at=now,
            expires_at=now + COMPLAINT_S,
        )
        data = sign_complaint(complaint, self._identity.sign, self._identity.public_key)
        self._nursery.start_soon(self._complaints.hear, [data])
        offers = [offer for offer in self.watcher.view.offers if offer.record.peer_id != answer.peer_id]
        for offer in sorted(offers, key=lambda _: self._random())[:TOLD]:
            self._nursery.start_soon(self._tell, offer.record, data)

    async def _tell(self, record: ServerRecord, data: bytes) -> None:
        with suppress(RemoteError):
            await fetch_record(self._host, record.peer_id, record.addrs, self.model, tell=[data])

    async def leave(self, session: RemoteSession, names: Sequence[bytes]) -> None:
        """Close a session; its servers may keep what it leaves, and the next one with these names goes to them."""
        holders = frozenset(hop.peer_id for hop in session.hops)
        for name in names:
            self._left[name] = holders
            self._left.move_to_end(name)
        while len(self._left) > REMEMBERED_NAMES:
            self._left.popitem(last=False)
        await session.close(names)

    def _who_has(self, names: Sequence[bytes]) -> frozenset[PeerId] | None:
        return next((self._left[name] for name in reversed(names) if name in self._left), None)

    @property
    def dtype(self) -> torch.dtype:
        """What embeddings and head compute in, and hidden states travel in: what the servers compute in, so that the
        result is that of the unsplit model in that dtype; float32 where they differ among themselves."""
        announced = self.watcher.dtypes
        return FLOATS_BY_NAME.get(next(iter(announced)), torch.float32) if len(announced) == 1 else torch.float32

    def chain(self, options: ClientOptions | Callable[[], ClientOptions] | None = None) -> RemoteChain:
        """All blocks as a `BlockChain` for the models, to be used from a torch thread.

        Args:
            options: a function is asked for them anew by each session and each forward pass.
        """
        current = options if callable(options) else partial(_same, options or ClientOptions())

        async def open_session(
            blocks: range, batch_size: int, max_length: int, lora: Lora | None, prefix: Prefix | None
        ) -> RemoteSession:
            return await self.open_session(blocks, batch_size, max_length, current(), lora, prefix)

        return RemoteChain(
            self.portal,
            self.blocks,
            self.checkpoint.hidden_size,
            self.dtype,
            open_session,
            lambda: self._trainer(current()),
            partial(RemoteSequenceManager, self, current),
        )

    def _trainer(self, options: ClientOptions) -> BatchTrainer:
        return BatchTrainer(
            self._home,
            self.watcher,
            self.model,
            self._deadlines(options),
            partial(self._throughput_route, options),
            adapter=options.active_adapter or "",
            encoding=COMPRESSIONS[options.compression],
            max_retries=options.max_retries,
            took=self._count,
        )

    async def language_model(self, head_quant: HeadQuant = "none") -> tuple[Any, PreTrainedTokenizerBase]:
        """Embeddings and head around the swarm's blocks, and the tokenizer; loaded once per dtypes, in a thread.

        Raises:
            ModelError: a checkpoint without head or tokenizer.
        """
        async with self._loading:
            key = (self.dtype, head_quant)
            if key not in self._language_models:
                self._language_models[key] = await trio.to_thread.run_sync(self._load, *key)
            return self._language_models[key]

    def _load(self, dtype: torch.dtype, head_quant: HeadQuant) -> tuple[Any, PreTrainedTokenizerBase]:
        model = load_causal_lm(self.checkpoint, self.chain(), dtype=dtype, head_quant=head_quant)
        if ignored := [*model.ignored_settings, *ignored_settings(model.generation_config)]:
            self._say(f"generation_config.json of {self.checkpoint.name}: ignored are {', '.join(ignored)}")
        return model, self.checkpoint.tokenizer()

    def load_model(
        self,
        head: Head,
        *,
        options: ClientOptions | None = None,
        tuning: Tuning | None = None,
        dtype: torch.dtype | None = None,
        mixins: Sequence[type] = (),
        **settings: Any,
    ) -> Any:
        """A model of its own over the swarm's blocks, with `AsyncTwins`; called in a thread, takes seconds.

        Args: as `petals.models.client.distributed.load_model`; `dtype` None: what the servers compute in.
        Raises:
            ModelError: a checkpoint without what `head` needs, a tuning or setting that cannot be.
        """
        options = options or ClientOptions()
        live = LiveOptions(options, LIVE_OPTIONS)
        model = load_model(
            self.checkpoint,
            self.chain(live),
            head=head,
            dtype=dtype or self.dtype,
            tuning=tuning,
            head_quant=options.head_quant,
            mixins=(AsyncTwins, *mixins),
            **settings,
        )
        live.follow(model.config)
        object.__setattr__(model, "portal", self.portal)  # nn.Module would look for parameters in it
        return model

    def _count(self, peer_id: PeerId, block_tokens: int) -> None:
        if not is_home(peer_id):
            self._took(peer_id, block_tokens)

    async def ready(self, options: ClientOptions | None = None) -> None:
        """Load the local blocks, and wait until every other one has a holder.

        Raises:
            MissingBlocks: names the blocks nobody holds, after `Timeouts.route_s`.
            UserError: local blocks that the model does not have.
        """
        options = options or ClientOptions()
        check_local(options.local_blocks, len(self.blocks))
        deadline = trio.current_time() + self._timeouts.route_s
        for blocks, kept in split(self.blocks, options.local_blocks):
            if kept is None:
                await self.watcher.wait_for(blocks, deadline)
        await self._hold(options)

    async def _hold(self, options: ClientOptions) -> None:
        """Have the local blocks loaded, in what the servers compute in at the time."""
        check_local(options.local_blocks, len(self.blocks))
        for blocks in options.local_blocks:
            await self._hold_as(name_of(blocks), blocks, self.dtype)

    async def _hold_as(self, name: PeerId, blocks: range, dtype: torch.dtype, quant_type: str = "none") -> None:
        async with self._loading:
            if not self._at_home:
                await self._nursery.start(self._home.run)
                self._at_home = True
        await self._home.hold(name, blocks, dtype, quant_type)

    def expected_route(self, max_length: int, options: ClientOptions | None = None) -> RouteChoice:
        """The route that a session of one row would be opened with now; nobody is asked.

        Raises:
            RouteError: there is none.
        """
        options = options or ClientOptions()
        nobody = frozenset[PeerId]()
        route = self._latency_route(options, 1, max_length, self.blocks, nobody)
        return self._explain(options, 1, max_length, self.blocks, route, nobody)

    def route(
        self, blocks: range, options: ClientOptions, *, mode: Literal["latency", "throughput"], max_length: int = 1
    ) -> Route:
        """Who would compute these blocks now: for a session of one row ("latency") or for a batch ("throughput").

        Raises:
            RouteError: there is no route.
        """
        if mode == "throughput":
            return self._throughput_route(options, blocks, frozenset())
        return self._latency_route(options, 1, max_length, blocks, frozenset())

    def _deadlines(self, options: ClientOptions) -> Timeouts:
        seconds = options.request_timeout
        if seconds is None:
            return self._timeouts
        shortest = min(self._timeouts.min_step_s, seconds)
        return replace(self._timeouts, step_s=seconds, training_s=seconds, min_step_s=shortest)

    def _push_pays(self, before: PeerId, after: PeerId) -> bool:
        return push_pays(self.watcher.view, before, after)

    def _latency_route(
        self,
        options: ClientOptions,
        batch_size: int,
        max_length: int,
        blocks: range,
        avoid: frozenset[PeerId],
        *,
        among: frozenset[PeerId] | None = None,
    ) -> Route:
        allowed = options.allowed_servers
        if among is not None:
            allowed = among if allowed is None else among & allowed
        find = partial(
            find_route,
            self.watcher.view,
            mode="latency",
            pushed=options.use_server_to_server is not False,
            batch_size=batch_size,
            cache_tokens=batch_size * max_length,
            allowed=allowed,
            blocked=options.blocked_servers | avoid | self.watcher.liars,
            adapter=options.active_adapter,
            require_dtype=options.require_dtype,
        )
        return _around_home(find, blocks, options.local_blocks)

    def _explain(
        self,
        options: ClientOptions,
        batch_size: int,
        max_length: int,
        blocks: range,
        route: Route,
        refused: frozenset[PeerId],
    ) -> RouteChoice:
        skipped = [
            each
            for run, kept in split(blocks, options.local_blocks)
            if kept is None
            for each in why_not(
                self.watcher.view,
                run,
                route,
                batch_size=batch_size,
                cache_tokens=batch_size * max_length,
                allowed=options.allowed_servers,
                blocked=options.blocked_servers | self.watcher.liars,
                refused=refused,
                adapter=options.active_adapter,
                require_dtype=options.require_dtype,
            )
        ]
        return RouteChoice(route, tuple(skipped))

    def _throughput_route(self, options: ClientOptions, blocks: range, avoid: frozenset[PeerId]) -> Route:
        find = partial(
            find_route,
            self.watcher.view,
            mode="throughput",
            rng=self._random,
            allowed=options.allowed_servers,
            blocked=options.blocked_servers | avoid | self.watcher.liars,
            adapter=options.active_adapter,
            require_dtype=options.require_dtype,
        )
        return _around_home(find, blocks, options.local_blocks)


def _same(options: ClientOptions) -> ClientOptions:
    return options


def _around_home(find: Callable[[range], Route], blocks: range, local: Sequence[range]) -> Route:
    """A route whose local blocks are ours whatever it costs, and the best one for each run of the others."""
    hops: list[RouteHop] = []
    for run, kept in split(blocks, local):
        hops += find(run).hops if kept is None else [leg_of(run, kept)]
    return Route(tuple(hops))
