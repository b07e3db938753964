"""Peers that were lost are dialled again: real hosts on loopback, one of which comes back under its key and port."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import trio

from petals.peer.base.identity import Identity, create_identity
from petals.peer.membership.contacts import FEW_LINKS, Contacts, without_itself
from petals.peer.membership.joining import join
from petals.peer.net.host import Host, HostConfig, open_host
from petals.protocols.errors import UserError

ANY = "/ip4/127.0.0.1/tcp/0"


@dataclass
class Party:
    """A host that can leave and come back."""

    nursery: trio.Nursery
    identity: Identity = field(default_factory=create_identity)
    listen: str = ANY
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    gone: trio.Event = field(default_factory=trio.Event)

    async def start(self) -> Host:
        host: Host = await self.nursery.start(self._run)
        self.listen = host.addrs[0].partition("/p2p/")[0]  # the same port the next time
        return host

    async def stop(self) -> None:
        self.scope.cancel()
        await self.gone.wait()

    async def _run(self, *, task_status: trio.TaskStatus[Host]) -> None:
        self.scope, self.gone = trio.CancelScope(), trio.Event()
        with self.scope:
            async with open_host(self.identity.key_pair, HostConfig(listen=(self.listen,))) as host:
                task_status.started(host)
                await trio.sleep_forever()
        self.gone.set()


@dataclass
class Watch:
    """What a `Contacts` reported."""

    said: list[str] = field(default_factory=list)
    returned: trio.Event = field(default_factory=trio.Event)

    def keep(self, host: Host, initial: Sequence[str], nursery: trio.Nursery) -> Contacts:
        contacts = Contacts(host, initial, self.said.append, rng=lambda: 0.5)
        contacts.on_return.append(self.returned.set)
        nursery.start_soon(contacts.run)
        return contacts


async def until_connected(host: Host, other: Host | Party, *, connected: bool = True) -> None:
    peer_id = other.peer_id if isinstance(other, Host) else other.identity.peer_id
    with trio.fail_after(20):
        while host.is_connected(peer_id) is not connected:  # noqa: ASYNC110  # a poll of the state waited for
            await trio.sleep(0.01)


async def told(watch: Watch) -> None:
    """A host knows that it is connected before those do who are told of it."""
    with trio.fail_after(20):
        await watch.returned.wait()


async def test_an_initial_peer_that_was_away_is_dialled_again(nursery: trio.Nursery) -> None:
    bootstrap, watch = Party(nursery), Watch()
    me = await Party(nursery).start()
    addrs = (await bootstrap.start()).addrs
    assert await join(me, addrs) is None
    watch.keep(me, addrs, nursery)
    await bootstrap.stop()
    await until_connected(me, bootstrap, connected=False)
    with trio.fail_after(20):
        while not watch.said:  # noqa: ASYNC110  # a poll of the state waited for
            await trio.sleep(0.01)
    assert not watch.returned.is_set()
    await bootstrap.start()
    await until_connected(me, bootstrap)
    await told(watch)
    name = f"initial peer …{bootstrap.identity.peer_id[-6:]}"
    assert watch.said == [f"{name} does not answer; it is dialled again", f"{name} answers again"]
    nursery.cancel_scope.cancel()


async def test_one_that_was_away_from_the_beginning_is_waited_for(nursery: trio.Nursery) -> None:
    bootstrap, watch = Party(nursery), Watch()
    addrs = (await bootstrap.start()).addrs
    await bootstrap.stop()
    me = await Party(nursery).start()
    failure = await join(me, addrs)
    assert failure is not None
    assert "refused" in str(failure)
    contacts = watch.keep(me, addrs, nursery)
    await bootstrap.start()
    with trio.fail_after(20):
        await contacts.somebody()
    await until_connected(me, bootstrap)
    await told(watch)
    nursery.cancel_scope.cancel()


async def test_neighbours_are_a_way_back_when_the_initial_peer_is_gone(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petals.peer.membership.contacts.MET_S", 0.0)
    bootstrap, neighbour, watch = Party(nursery), Party(nursery), Watch()
    me = await Party(nursery).start()
    addrs = (await bootstrap.start()).addrs
    await join(me, addrs)
    watch.keep(me, addrs, nursery)
    await me.connect((await neighbour.start()).addrs[0])
    for each in (bootstrap, neighbour):
        await each.stop()
        await until_connected(me, each, connected=False)
    await neighbour.start()
    await until_connected(me, neighbour)
    await told(watch)
    nursery.cancel_scope.cancel()


async def test_lost_neighbours_are_dialled_only_while_links_are_few(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MET_S", "FIRST_PAUSE_S"):
        monkeypatch.setattr(f"petals.peer.membership.contacts.{name}", 0.0)
    me, neighbour = await Party(nursery).start(), Party(nursery)
    contacts = Contacts(me, (), rng=lambda: 0.5)
    links = [Party(nursery) for _ in range(FEW_LINKS)]
    for each in (*links, neighbour):
        await me.connect((await each.start()).addrs[0])
    assert contacts._due() == []
    await neighbour.stop()
    await until_connected(me, neighbour, connected=False)
    assert contacts._due() == contacts._due() == []
    await links[0].stop()
    await until_connected(me, links[0], connected=False)
    contacts._due()
    assert {each.peer_id for each in contacts._due()} == {neighbour.identity.peer_id, links[0].identity.peer_id}
    nursery.cancel_scope.cancel()


async def test_who_passed_by_is_forgotten(nursery: trio.Nursery) -> None:
    me, passing, watch = await Party(nursery).start(), Party(nursery), Watch()
    contacts = watch.keep(me, (), nursery)
    await me.connect((await passing.start()).addrs[0])
    assert passing.identity.peer_id in contacts._contacts
    await passing.stop()
    await until_connected(me, passing, connected=False)
    contacts._due()
    assert passing.identity.peer_id not in contacts._contacts
    nursery.cancel_scope.cancel()


async def test_all_peers_of_a_swarm_may_be_given_the_same_list(nursery: trio.Nursery) -> None:
    me, other = await Party(nursery).start(), await Party(nursery).start()
    assert without_itself(me, [*me.addrs, *other.addrs]) == list(other.addrs)
    with pytest.raises(UserError, match="another process uses the same key; give each its own --identity"):
        without_itself(me, [f"/ip4/127.0.0.1/tcp/1/p2p/{me.peer_id}"])
    with pytest.raises(UserError, match="is no full address"):
        without_itself(me, ["/ip4/127.0.0.1/tcp/1"])
    nursery.cancel_scope.cancel()
