"""A live server under attack: the honest client loses nothing, and nothing of the attackers stays."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import pytest
import torch
import trio
from libp2p.peer.id import ID

from petals.peer.client.model_client import ModelClient
from petals.peer.engine import inference
from petals.peer.node import Peer
from petals.protocols.types import PeerId
from tests.fakes.attackers import PROTOCOLS, Attacker, Target, idle_connection, run_attacker
from tests.swarm.conftest import Swarm, Truth, all_leases_returned

pytestmark = pytest.mark.parametrize("tiny_truth", ["llama"], indirect=True)

MAX_GROWTH_BYTES = 256 << 20
"""Of the whole process, attackers and their connections included."""
CACHE_BYTES = 1 << 20


@dataclass
class Siege:
    """A server, and a client that asked it something before anybody attacked."""

    swarm: Swarm
    server: Peer
    client: ModelClient
    steps: list[torch.Tensor]
    expected: list[torch.Tensor]
    target: Target
    client_peer: PeerId

    async def honest_work(self) -> None:
        """One whole session, opened now; every bit as before, in one go."""
        with trio.fail_after(60):
            session = await self.client.open_session(self.client.blocks, 1, 16)
            for step, expected in zip(self.steps, self.expected, strict=True):
                assert torch.equal(await session.step(step), expected)
            await session.close()
        assert not session.failures

    async def under(
        self, *attacks: Callable[[Attacker], Awaitable[None]], enough: Callable[[], bool]
    ) -> list[Attacker]:
        """Work while the attacks run, until they have got enough done; then look at what is left of them."""
        before = psutil.Process().memory_info().rss
        attackers: list[Attacker] = []
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for attack in attacks:
                    nursery.start_soon(run_attacker, self.target, attack, attackers)
                while not (attackers and enough()):
                    await self.honest_work()
                await self.honest_work()
                nursery.cancel_scope.cancel()
        assert psutil.Process().memory_info().rss - before < MAX_GROWTH_BYTES
        await self.honest_work()
        await self.all_quiet()
        return attackers

    async def all_quiet(self) -> None:
        """No lease, session, handler, stream or half-open door is left; the honest client's connection is."""
        await all_leases_returned(self.server)
        host: Any = self.server.host
        assert self.server.server is not None
        inbound = self.server.server.inbound
        with trio.fail_after(20):
            while True:
                streams = sum(
                    len(conn.muxed_conn.connection.session.streams)
                    for conn in host._network.get_connections()
                    if conn.muxed_conn.peer_id != ID.from_base58(self.client_peer)
                )
                if not (streams or host._half_open or inbound._mailboxes or self.server.directory._dht._inbound):
                    return
                await trio.sleep(0.005)


@pytest.fixture
async def siege(make_swarm: Callable[..., Swarm], tiny_truth: Truth) -> Siege:
    swarm = make_swarm(tiny_truth.directory)
    server = await swarm.add(range(4), cache_bytes=CACHE_BYTES, max_peer_share=0.25, max_wait_s=0.0)
    peer = await swarm.add()
    client = await peer.client()
    assert server.server is not None
    size = client.checkpoint.hidden_size
    steps = list(torch.randn(6, 1, 1, size, generator=torch.Generator().manual_seed(0)))
    session = await client.open_session(client.blocks, 1, 16)
    expected = [await session.step(step) for step in steps]
    await session.close()
    target = Target(server.peer_id, server.addrs[0], server.server.model, size)
    return Siege(swarm, server, client, steps, expected, target, peer.peer_id)


def done(attackers: list[Attacker], what: str) -> int:
    return sum(attacker.done.get(what, 0) for attacker in attackers)


async def test_slow_and_silent_streams(siege: Siege, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes one by one, half a payload, streams and sockets that say nothing."""
    told: list[Attacker] = []

    async def loris(attacker: Attacker) -> None:
        told.append(attacker)
        await attacker.slow_loris(pause_s=0.0)

    silent = [partial(silence_of, told, protocol=protocol) for protocol in PROTOCOLS * 6]
    doors = [Attacker.half_a_handshake] * 20
    await siege.under(*[loris] * 4, *silent, *doors, enough=lambda: done(told, "silent streams") >= len(silent))
    assert done(told, "loris bytes") > 100


async def silence_of(told: list[Attacker], attacker: Attacker, protocol: str) -> None:
    told.append(attacker)
    await attacker.silence(protocol)


async def test_who_opens_a_stream_and_asks_nothing_is_sent_away(siege: Siege, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "FIRST_WORDS_S", 0.05)

    async def wait(attacker: Attacker) -> None:
        messages = await attacker.stream(PROTOCOLS[0])
        assert await messages.read_message() is not None
        assert await messages.read_message() is None
        attacker.note("sent away")

    attackers: list[Attacker] = []
    with trio.fail_after(20):
        await run_attacker(siege.target, wait, attackers)
    assert attackers[0].done == {"sent away": 1}


async def test_nonsense(siege: Siege) -> None:
    """Sizes nobody can send, steps out of order, guessed sessions."""
    finished: list[str] = []

    async def run(attack: Callable[[Attacker], Awaitable[None]], attacker: Attacker) -> None:
        await attack(attacker)
        finished.append(attacker.identity.peer_id)

    attacks = (Attacker.huge_sizes, Attacker.out_of_order, partial(Attacker.guess_sessions, count=100))
    attackers = await siege.under(*[partial(run, attack) for attack in attacks], enough=lambda: len(finished) == 3)
    assert (done(attackers, "huge sizes"), done(attackers, "steps out of order"), done(attackers, "guesses")) == (
        15,
        4,
        100,
    )


async def test_one_peer_gets_its_share_of_the_cache(siege: Siege) -> None:
    """And many get all of it: then newcomers are told so at once, and who has a session goes on."""
    assert siege.server.server is not None
    budget = siege.server.server.budget
    session_bytes = siege.server.server.span.cache_bytes(range(4), 1, 64)
    greedy = partial(Attacker.exhaust_cache, max_length=64, count=CACHE_BYTES // session_bytes + 1)
    share = budget.total_bytes - budget.total_bytes // 4
    attackers = await siege.under(greedy, enough=lambda: budget.left_bytes < share + session_bytes)
    assert done(attackers, "cache opened") == CACHE_BYTES // 4 // session_bytes

    session = await siege.client.open_session(siege.client.blocks, 1, 16)
    assert torch.equal(await session.step(siege.steps[0]), siege.expected[0])
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(run_attacker, siege.target, greedy)
            while budget.left_bytes >= session_bytes:  # noqa: ASYNC110
                await trio.sleep(0.005)
            for step, expected in zip(siege.steps[1:], siege.expected[1:], strict=True):
                assert torch.equal(await session.step(step), expected)
            nursery.cancel_scope.cancel()
    assert not session.failures
    await session.close()
    await siege.all_quiet()


async def test_floods_of_records(siege: Siege) -> None:
    """Of one key each: the honest server is found all the same, and no answer grows too long to be read."""
    finished: list[Attacker] = []

    async def flood(attacker: Attacker) -> None:
        await attacker.flood_records(80)
        finished.append(attacker)

    await siege.under(flood, flood, enough=lambda: len(finished) == 2)
    assert done(finished, "records") > 160
    late = await siege.swarm.add()
    found = await late.directory.lookup(siege.target.model)
    assert siege.server.peer_id in {record.peer_id for record in found}
    for peer in siege.swarm.peers:
        store = peer.directory._provided.providers
        assert sum(len(entries) for entries in store.values()) <= 2 * 64 + 1
        sizes = [
            len(addr.to_bytes()) for all in store.values() for each in all.values() for addr in each.provider_info.addrs
        ]
        assert max(sizes, default=0) <= 256


async def test_storms_of_resets(siege: Siege) -> None:
    counted: list[Attacker] = []

    async def storm(attacker: Attacker) -> None:
        counted.append(attacker)
        await attacker.reset_storm(1 << 30)

    await siege.under(storm, storm, enough=lambda: done(counted, "resets") >= 3000)


async def test_idle_connections(siege: Siege) -> None:
    """A hundred identities that connect and say nothing (benchmarks/hostile.py: a thousand). The host takes 24 at once:
    the silent ones make room for each other, and for whoever has something to ask."""
    host: Any = siege.server.host
    config = host._network.connection_config
    config.max_connections = 24
    let_in: list[bool] = []
    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(idle_connection, siege.target, let_in.append)
            while let_in.count(True) < 60:
                await siege.honest_work()
            late = await siege.swarm.add()
            await siege.honest_work()
            assert late.host.is_connected(siege.server.peer_id)
            nursery.cancel_scope.cancel()
    await siege.honest_work()
    await siege.all_quiet()
