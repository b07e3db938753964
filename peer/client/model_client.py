"""One model as this peer's client sees it: the view of its swarm, and everything opened over it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import trio
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from petals.models.adapters import Lora
from petals.models.causal_lm import load_causal_lm
from petals.models.checkpoint import Checkpoint
from petals.models.distributed import Head, load_model
from petals.models.tuning import Tuning
from petals.peer.client.batch import BatchTrainer, Companions
from petals.peer.client.chain import RemoteChain
from petals.peer.client.hop import SessionSpec
from petals.peer.client.routing import Route, RouteChoice, find_route, why_not
from petals.peer.client.session import RemoteSession, StepTrace
from petals.peer.client.twins import AsyncTwins
from petals.peer.client.view import SwarmWatcher
from petals.peer.config import Timeouts
from petals.peer.host import Host
from petals.peer.ledger import nobody_counts
from petals.peer.portal import Portal
from petals.protocols.errors import RouteError, UserError
from petals.protocols.tensors import COMPRESSIONS, FLOATS_BY_NAME
from petals.protocols.types import ModelId, PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """What a client wants of its servers."""

    allowed_servers: frozenset[PeerId] | None = None
    blocked_servers: frozenset[PeerId] = frozenset()
    max_retries: int = 10
    """Failures in a row that one step, or one span of a batch, may survive."""
    compression: str = "none"
    """none (exact), float16 or int8: how hidden states travel."""
    active_adapter: str | None = None
    """Only servers that host this LoRA adapter, which is then applied."""
    require_dtype: str | None = None
    """Only servers that compute in this dtype without quantisation; None: any."""
    exact_recovery: bool = True
    """After a fail-over even the logits are the same to the last bit; False: the same up to rounding, and sooner
    (docs/failover.md has the figures)."""
    use_server_to_server: bool = True
    """Let servers push activations to each other; they fall back to us where they cannot reach each other."""
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
        if self.compression not in COMPRESSIONS:
            raise UserError(f"unknown compression {self.compression!r}: choose {', '.join(COMPRESSIONS)}")
        if self.max_retries < 0:
            raise UserError("max_retries must not be negative")
        for name in ("allowed_servers", "blocked_servers"):
            if isinstance(getattr(self, name), str):
                raise UserError(f"{name} is a collection of peer IDs, not one of them")


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
        took: Callable[[PeerId, int], None] = nobody_counts,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.watcher = watcher
        self.portal = portal
        self._host = host
        self._language_models: dict[torch.dtype, tuple[Any, PreTrainedTokenizerBase]] = {}
        self._loading = trio.Lock()
        self._timeouts = timeouts
        self._random = random
        self._say = say
        self._nursery = nursery
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
        spec = SessionSpec(
            model=self.model,
            hidden_size=self.checkpoint.hidden_size,
            batch_size=batch_size,
            max_length=max_length,
            adapter=options.active_adapter or "",
            lora=lora,
            encoding=COMPRESSIONS[options.compression],
            prefixes=() if prefix is None else prefix.names,
            took=self._took,
        )

        async def prefix_inputs(block: int, tokens: int) -> Tensor:
            assert prefix is not None
            hidden = (await trio.to_thread.run_sync(prefix.inputs))[:, :tokens]
            if block == blocks.start:
                return hidden
            output, _ = await self._trainer(options).forward(hidden, Companions(blocks=range(blocks.start, block)))
            return output

        last: list[tuple[Route, frozenset[PeerId]]] = []

        familiar = None if prefix is None else self._who_has(prefix.names)

        def find(blocks: range, avoid: frozenset[PeerId]) -> Route:
            route = self._latency_route(options, batch_size, max_length, blocks, avoid)
            if familiar is not None and not avoid:
                with suppress(RouteError):
                    known = self._latency_route(options, batch_size, max_length, blocks, avoid, among=familiar)
                    route = known if known.expected_s <= DETOUR * route.expected_s else route
            last[:] = [(route, avoid)]
            return route

        session = RemoteSession(
            self._host,
            self.watcher,
            blocks,
            spec,
            self._deadlines(options),
            find,
            max_retries=options.max_retries,
            exact_recovery=options.exact_recovery,
            push=options.use_server_to_server,
            prefix_inputs=prefix_inputs,
            standby_in=self._nursery if options.standby else None,
            on_step=options.on_step,
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
        announced = {offer.record.dtype for offer in self.watcher.view.offers}
        return FLOATS_BY_NAME.get(announced.pop(), torch.float32) if len(announced) == 1 else torch.float32

    def chain(self, options: ClientOptions | None = None) -> RemoteChain:
        """All blocks as a `BlockChain` for the models, to be used from a torch thread."""
        options = options or ClientOptions()

        async def open_session(
            blocks: range, batch_size: int, max_length: int, lora: Lora | None, prefix: Prefix | None
        ) -> RemoteSession:
            return await self.open_session(blocks, batch_size, max_length, options, lora, prefix)

        trainer = self._trainer(options)
        return RemoteChain(self.portal, self.blocks, self.checkpoint.hidden_size, self.dtype, open_session, trainer)

    def _trainer(self, options: ClientOptions) -> BatchTrainer:
        return BatchTrainer(
            self._host,
            self.watcher,
            self.model,
            self._deadlines(options),
            partial(self._throughput_route, options),
            adapter=options.active_adapter or "",
            encoding=COMPRESSIONS[options.compression],
            max_retries=options.max_retries,
            took=self._took,
        )

    async def language_model(self) -> tuple[Any, PreTrainedTokenizerBase]:
        """Embeddings and head around the swarm's blocks, and the tokenizer; loaded once per dtype, in a thread.

        Raises:
            ModelError: a checkpoint without head or tokenizer.
        """
        async with self._loading:
            dtype = self.dtype
            if dtype not in self._language_models:
                self._language_models[dtype] = await trio.to_thread.run_sync(self._load, dtype)
            return self._language_models[dtype]

    def _load(self, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
        return load_causal_lm(self.checkpoint, self.chain(), dtype=dtype), self.checkpoint.tokenizer()

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

        Args: as `petals.models.distributed.load_model`; `dtype` None: what the servers compute in.
        Raises:
            ModelError: a checkpoint without what `head` needs, a tuning or setting that cannot be.
        """
        model = load_model(
            self.checkpoint,
            self.chain(options),
            head=head,
            dtype=dtype or self.dtype,
            tuning=tuning,
            mixins=(AsyncTwins, *mixins),
            **settings,
        )
        object.__setattr__(model, "portal", self.portal)  # nn.Module would look for parameters in it
        return model

    async def ready(self) -> None:
        """Wait until every block has a holder.

        Raises:
            MissingBlocks: names the blocks nobody holds, after `Timeouts.route_s`.
        """
        deadline = trio.current_time() + self._timeouts.route_s
        await self.watcher.wait_for(self.blocks, deadline)

    def _deadlines(self, options: ClientOptions) -> Timeouts:
        seconds = options.request_timeout
        if seconds is None:
            return self._timeouts
        shortest = min(self._timeouts.min_step_s, seconds)
        return replace(self._timeouts, step_s=seconds, training_s=seconds, min_step_s=shortest)

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
        return find_route(
            self.watcher.view,
            blocks,
            mode="latency",
            pushed=options.use_server_to_server,
            batch_size=batch_size,
            cache_tokens=batch_size * max_length,
            allowed=allowed,
            blocked=options.blocked_servers | avoid,
            adapter=options.active_adapter,
            require_dtype=options.require_dtype,
        )

    def _explain(
        self,
        options: ClientOptions,
        batch_size: int,
        max_length: int,
        blocks: range,
        route: Route,
        refused: frozenset[PeerId],
    ) -> RouteChoice:
        skipped = why_not(
            self.watcher.view,
            blocks,
            route,
            batch_size=batch_size,
            cache_tokens=batch_size * max_length,
            allowed=options.allowed_servers,
            blocked=options.blocked_servers,
            refused=refused,
            adapter=options.active_adapter,
            require_dtype=options.require_dtype,
        )
        return RouteChoice(route, skipped)

    def _throughput_route(self, options: ClientOptions, blocks: range, avoid: frozenset[PeerId]) -> Route:
        return find_route(
            self.watcher.view,
            blocks,
            mode="throughput",
            rng=self._random,
            allowed=options.allowed_servers,
            blocked=options.blocked_servers | avoid,
            adapter=options.active_adapter,
            require_dtype=options.require_dtype,
        )
