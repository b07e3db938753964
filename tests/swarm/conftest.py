"""Swarms of real peers in one process: real hosts on loopback with port 0, real blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals.models.source.checkpoint import Checkpoint, open_checkpoint
from petals.peer.base.config import PeerConfig, ServeConfig, Timeouts
from petals.peer.node import Peer, open_peer
from tests.models.tiny import CASES, save_tiny


@dataclass
class Swarm:
    """Peers of one model, each with a task of its own, so that one can leave while the others stay."""

    nursery: trio.Nursery
    model: str | None
    peers: list[Peer] = field(default_factory=list)
    scopes: dict[str, trio.CancelScope] = field(default_factory=dict)
    gone: dict[str, trio.Event] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    """What every peer's `PeerConfig` has besides."""

    async def add(
        self,
        blocks: range | None = None,
        *,
        identity: Path | None = None,
        also: dict[str, Any] | None = None,
        **serve: Any,
    ) -> Peer:
        """A peer that serves `blocks`, or only asks; `also` has more of its `PeerConfig`."""
        settings = None
        if blocks is not None or serve:
            settings = ServeConfig(blocks=blocks, **{"throughput": 100.0, "cache_bytes": 256 << 20, **serve})
        config = PeerConfig(
            model=self.model,
            serve=settings,
            identity=identity,
            **{
                "initial_peers": self.peers[0].addrs if self.peers else (),
                "timeouts": Timeouts(route_s=8.0),
                **self.common,
                **(also or {}),
            },
        )
        peer: Peer = await self.nursery.start(self._run, config)
        self.peers.append(peer)
        return peer

    async def stop(self, peer: Peer) -> None:
        """Let a peer leave, politely, and wait until it has."""
        self.scopes[peer.peer_id].cancel()
        await self.gone[peer.peer_id].wait()
        self.peers.remove(peer)

    async def _run(self, config: PeerConfig, *, task_status: trio.TaskStatus[Peer]) -> None:
        with trio.CancelScope() as scope:
            async with open_peer(config) as peer:
                self.scopes[peer.peer_id] = scope
                gone = self.gone[peer.peer_id] = trio.Event()
                task_status.started(peer)
                try:
                    await trio.sleep_forever()
                finally:
                    gone.set()


async def all_leases_returned(peer: Peer) -> None:
    """Wait until a server's whole cache is free again, and its memory for requests; the test's own deadline is the
    bound."""
    assert peer.server is not None
    with trio.fail_after(10):
        inbound, budgets = peer.server.inbound, (peer.server.budget, peer.server.inbound.work)
        while inbound.sessions or any(budget.left_bytes < budget.total_bytes for budget in budgets):  # noqa: ASYNC110
            await trio.sleep(0.001)  # a poll of the state waited for


@pytest.fixture
def make_swarm(nursery: trio.Nursery) -> Callable[[str | None], Swarm]:
    return lambda model=None: Swarm(nursery, str(model) if model is not None else None)


@dataclass(frozen=True)
class Truth:
    """A checkpoint and the same model run by `transformers` in one piece."""

    checkpoint: Checkpoint
    model: Any
    tokenizer: Any = None

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory


@pytest.fixture(scope="session")
def smollm() -> Truth:
    checkpoint = open_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(str(checkpoint.directory), dtype=torch.float32).eval()
    return Truth(checkpoint, model, AutoTokenizer.from_pretrained(str(checkpoint.directory)))


@pytest.fixture(scope="session", params=["llama", "bloom"])
def tiny_truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """A random-weight model of four blocks whose greedy tokens vary."""
    case = next(case for case in CASES if case.id == request.param)
    directory = tmp_path_factory.mktemp(f"swarm-{case.id}")
    model = save_tiny(case, directory)
    return Truth(open_checkpoint(str(directory)), model)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several peers share CI's two cores; the truth must be computed with the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
