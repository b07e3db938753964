"""Directories on real hosts: loopback, port 0."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import trio

from petals.dht.directory import Directory, open_directory
from petals.dht.records import ServerRecord, ServerState, sign_record
from petals.peer.base.identity import Identity, create_identity, verify
from petals.peer.membership.record_exchange import answer_info, fetch_record
from petals.peer.net.host import Host, HostConfig, open_host
from petals.protocols.info import INFO_V1
from petals.protocols.types import ModelId, PeerId

MODEL = ModelId("tiny", "ab" * 32)


def make_record(peer_id: PeerId, **changes: Any) -> ServerRecord:
    """A valid record of now."""
    now = time.time()
    record = ServerRecord(
        model=MODEL,
        peer_id=peer_id,
        blocks=range(4),
        state=ServerState.ONLINE,
        sequence=int(now * 1000),
        issued_at=now,
        expires_at=now + 90,
    )
    return replace(record, **changes)


@dataclass
class Node:
    """One peer of the directory. `served` is what it says of itself when asked directly."""

    identity: Identity
    host: Host
    directory: Directory
    served: list[ServerRecord] = field(default_factory=list)

    @property
    def peer_id(self) -> PeerId:
        return self.host.peer_id

    async def announce(self, **changes: Any) -> ServerRecord:
        instance = self.directory.namesake.instance
        record = make_record(self.peer_id, **{"addrs": self.host.addrs, "instance": instance, **changes})
        self.served[:] = [record]
        await self.directory.announce(record)
        return record

    def signed(self, digest: str) -> list[bytes]:
        return [sign_record(each, self.identity.sign, self.identity.public_key) for each in self.served]


@dataclass
class Net:
    nursery: trio.Nursery
    nodes: list[Node] = field(default_factory=list)
    scopes: dict[str, trio.CancelScope] = field(default_factory=dict)
    gone: dict[str, trio.Event] = field(default_factory=dict)

    async def add(
        self, *, direct: bool = True, clock: Callable[[], float] = time.time, identity: Identity | None = None
    ) -> Node:
        """A node joined to the first one."""
        node: Node = await self.nursery.start(self._run, direct, clock, identity or create_identity())
        self.nodes.append(node)
        return node

    async def stop(self, node: Node) -> None:
        """Gone, without a word."""
        self.scopes[node.peer_id].cancel()
        await self.gone[node.peer_id].wait()
        self.nodes.remove(node)

    async def _run(
        self,
        direct: bool,
        clock: Callable[[], float],
        identity: Identity,
        *,
        task_status: trio.TaskStatus[Node],
    ) -> None:
        with trio.CancelScope() as scope:
            async with open_host(identity.key_pair, HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))) as host:
                if self.nodes:
                    await host.connect(self.nodes[0].host.addrs[0])

                async def fetch(peer_id: PeerId, addrs: tuple[str, ...], model: ModelId) -> bytes | None:
                    return await fetch_record(host, peer_id, addrs, model)

                async with open_directory(
                    host, identity, verify, fetch_direct=fetch if direct else None, clock=clock
                ) as directory:
                    node = Node(identity, host, directory)

                    async def answer(stream: Any) -> None:
                        await answer_info(node.signed, stream)

                    host.set_handler(INFO_V1, answer)
                    self.scopes[node.peer_id] = scope
                    self.gone[node.peer_id] = trio.Event()
                    task_status.started(node)
                    await trio.sleep_forever()
        self.gone[identity.peer_id].set()


@pytest.fixture
def net(nursery: trio.Nursery) -> Net:
    return Net(nursery)
