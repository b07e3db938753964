"""What announcing and looking up costs: real hosts in one process, and a simulation for swarms that do not fit here.

Run: python benchmarks/directory.py [--peers 10 30 100] [--simulate 1000 10000] [--churn 50]
benchmarks/churn.py has a process for each host.
"""

from __future__ import annotations

import argparse
import bisect
import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import trio
import trio.testing

from petals.dht.directory import PATIENCE_S, READ_FROM, STORE_AT, Directory, open_directory
from petals.dht.records import ServerRecord, ServerState, sign_record
from petals.dht.walk import walk
from petals.peer.base.identity import create_identity, verify
from petals.peer.membership.record_exchange import answer_info, fetch_record
from petals.peer.net.host import Host, HostConfig, open_host
from petals.peer.server.announcer import Announcer
from petals.protocols.info import INFO_V1
from petals.protocols.stream import ByteStream
from petals.protocols.types import ModelId, PeerId

MODEL = ModelId("benchmark", "0" * 64)


@dataclass
class Node:
    host: Host
    directory: Directory
    scope: trio.CancelScope
    record: ServerRecord
    own: trio.Nursery
    gone: trio.Event = field(default_factory=trio.Event)

    async def keep_announced(self) -> None:
        """As a server does: now, soon again, and every 30 s for as long as the node lives."""
        announcer = Announcer(self.directory, lambda: self.record, every_s=30.0)
        await announcer.enter(ServerState.ONLINE)
        self.own.start_soon(announcer.run)


def record_of(host: Host) -> ServerRecord:
    """What a server without blocks says of itself; whoever sends it dates it."""
    return ServerRecord(
        model=MODEL,
        peer_id=host.peer_id,
        blocks=range(12),
        state=ServerState.ONLINE,
        addrs=host.addrs,
        sequence=1,
        issued_at=0.0,
        expires_at=0.0,
    )


async def run_node(join: str | None, *, task_status: trio.TaskStatus[Node] = trio.TASK_STATUS_IGNORED) -> None:
    identity = create_identity()
    with trio.CancelScope() as scope:
        async with open_host(identity.key_pair, HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))) as host:
            if join is not None:
                await host.connect(join)

            async def fetch(peer_id: PeerId, addrs: tuple[str, ...], model: ModelId) -> bytes | None:
                return await fetch_record(host, peer_id, addrs, model)

            async with open_directory(host, identity, verify, fetch_direct=fetch) as directory:
                now = time.time()
                record = replace(record_of(host), issued_at=now, expires_at=now + 3600)
                signed = [sign_record(record, identity.sign, identity.public_key)]

                async def answer(stream: ByteStream) -> None:
                    await answer_info(lambda _: signed, stream)

                host.set_handler(INFO_V1, answer)
                try:
                    async with trio.open_nursery() as own:
                        node = Node(host, directory, scope, record, own)
                        task_status.started(node)
                        await trio.sleep_forever()
                finally:
                    node.gone.set()


async def measure(peers: int, churn: int) -> None:
    async with trio.open_nursery() as nursery:
        nodes: list[Node] = [await nursery.start(run_node, None)]
        for _ in range(peers - 1):
            nodes.append(await nursery.start(run_node, nodes[0].host.addrs[0]))
        announced = [await timed(node.directory.announce, node.record) for node in nodes]
        again = [await timed(node.directory.announce, node.record) for node in random.sample(nodes, min(10, peers))]
        sent = sum(node.directory.asked for node in nodes)
        readers = random.sample(nodes, min(10, peers))
        first = [await timed(reader.directory.lookup, MODEL) for reader in readers]
        complete = [len(await reader.directory.lookup(MODEL)) / peers for reader in readers]
        second = [await timed(reader.directory.lookup, MODEL) for reader in readers]
        print(
            f"{peers:6} peers | announce {ms(announced)}, again {ms(again)}, "
            f"{sent / (len(announced) + len(again)):.0f} questions | lookup first {ms(first)}, then {ms(second)}, "
            f"finds {min(complete):.0%}"
        )
        if churn:
            for node in nodes:
                await node.keep_announced()
            await churned(nursery, nodes, churn)
            for _ in range(2):
                await stormed(nursery, nodes)
        nursery.cancel_scope.cancel()


async def churned(nursery: trio.Nursery, nodes: list[Node], events: int) -> None:
    """Peers come and go without a word, one after another; after each, somebody looks up."""
    looks = []
    for number in range(events):
        if number % 2:
            node = await nursery.start(run_node, random.choice(nodes).host.addrs[0])
            await node.keep_announced()
            nodes.append(node)
        else:
            node = nodes.pop(random.randrange(len(nodes)))
            node.scope.cancel()
            await node.gone.wait()
        looks.append(await look(random.choice(nodes), nodes))
    report(f"{events} comings and goings", nodes, looks)


async def stormed(nursery: trio.Nursery, nodes: list[Node]) -> None:
    """Half of the peers vanish at the same moment, without a word; ten of those left look up one after another.
    Then as many join together, and ten look up meanwhile."""
    half = len(nodes) // 2
    random.shuffle(nodes)
    dead = [nodes.pop() for _ in range(half)]
    for node in dead:
        node.scope.cancel()
    for node in dead:
        await node.gone.wait()
    times = [await look(reader, nodes) for reader in nodes[:10]]
    report(f"{half} gone at once", nodes, times)

    async def join() -> None:
        node = await nursery.start(run_node, random.choice(nodes[:half]).host.addrs[0])
        await node.keep_announced()
        nodes.append(node)

    staying = list(nodes)
    joining_times = []
    async with trio.open_nursery() as joiners:
        for _ in range(half):
            joiners.start_soon(join)
        for reader in staying[:10]:
            joining_times.append(await look(reader, staying, newcomers=True))
    report(f"{half} joining at once", nodes, joining_times)
    joined = trio.current_time()
    with trio.move_on_after(60):
        while sum([(await look(reader, nodes))[1] for reader in nodes[:5]]):  # noqa: ASYNC110
            await trio.sleep(1.0)
    print(f"{len(nodes):6} peers | waited {trio.current_time() - joined:.0f} s until five readers listed all of them")
    report("then", nodes, [await look(reader, nodes) for reader in nodes[:10]])


async def look(reader: Node, nodes: list[Node], *, newcomers: bool = False) -> tuple[float, int]:
    """Seconds of a lookup, and how many it missed or listed wrongly; `newcomers`: others may be there already."""
    started = trio.current_time()
    found = {record.peer_id for record in await reader.directory.lookup(MODEL)}
    elapsed = trio.current_time() - started
    alive = {node.host.peer_id for node in nodes}
    return elapsed, len(alive - found if newcomers else alive ^ found)


def report(what: str, nodes: list[Node], looks: list[tuple[float, int]]) -> None:
    wrong = sum(wrong for _, wrong in looks)
    print(f"{len(nodes):6} peers | {what}: lookup {ms([s for s, _ in looks])}; {wrong} missing or listed dead")


async def timed(call: object, *arguments: object) -> float:
    started = trio.current_time()
    await call(*arguments)  # type: ignore[operator]
    return trio.current_time() - started


def ms(times: list[float]) -> str:
    return f"{1e3 * statistics.median(times):.0f} ms (max {1e3 * max(times):.0f})"


async def simulate(peers: int, dead_share: float) -> None:
    """Questions of one search, in rounds of one round trip each: the same search on a network without network."""
    dice = random.Random(0)
    ids = sorted(dice.getrandbits(256) for _ in range(peers))
    known = {node: buckets_of(node, ids, dice) for node in ids}
    dead = set(dice.sample(ids, int(peers * dead_share)))
    alive = [node for node in ids if node not in dead]
    for what, want in (("lookup", READ_FROM), ("announce", STORE_AT)):
        questions, round_trips, hits = [], [], 0
        for _ in range(50):
            target, reader, asked = dice.getrandbits(256), dice.choice(alive), 0

            async def ask(node: int, target: int = target) -> Iterable[int] | None:
                nonlocal asked
                asked += 1
                await trio.sleep(0.02)  # a round trip of the mock clock
                return None if node in dead else sorted(known[node], key=lambda other: other ^ target)[:20]

            started = trio.current_time()
            found = await walk(
                sorted(known[reader], key=lambda other, target=target: other ^ target)[:20],
                lambda node, target=target: node ^ target,
                ask,
                want=want,
                patience_s=PATIENCE_S,
                total_s=60.0,
            )
            round_trips.append((trio.current_time() - started) / 0.02)
            questions.append(asked)
            nearest = sorted((node for node in alive if node != reader), key=lambda node, t=target: node ^ t)[:want]
            hits += len(set(found) & set(nearest))
        print(
            f"{peers:6} peers, {dead_share:.0%} dead | {what:8} {statistics.mean(questions):5.1f} questions to search, "
            f"{statistics.mean(round_trips):.1f} round trips, {hits / (50 * want):.1%} of the nearest {want} found"
        )


def buckets_of(node: int, ids: list[int], dice: random.Random) -> list[int]:
    """A routing table: up to 20 peers for each length of common prefix."""
    buckets: dict[int, list[int]] = {}
    for other in ids if len(ids) <= 1000 else [*dice.sample(ids, 1000), *near(node, ids)]:
        bucket = buckets.setdefault((node ^ other).bit_length(), [])
        if other != node and len(bucket) < 20:
            bucket.append(other)
    return [other for bucket in buckets.values() for other in bucket]


def near(node: int, ids: list[int]) -> list[int]:
    """Those next to it in order: among them are the peers with the longest common prefixes."""

    place = bisect.bisect_left(ids, node)
    return ids[max(0, place - 40) : place + 40]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="*", default=[10, 30, 100])
    parser.add_argument("--simulate", type=int, nargs="*", default=[1000, 10000])
    parser.add_argument("--churn", type=int, default=50, help="comings and goings after the largest measurement")
    options = parser.parse_args()
    random.seed(0)
    for peers in options.peers:
        trio.run(measure, peers, options.churn if peers == max(options.peers) else 0)
    for peers in options.simulate:
        for dead_share in (0.0, 0.3):
            trio.run(simulate, peers, dead_share, clock=trio.testing.MockClock(autojump_threshold=0))


if __name__ == "__main__":
    main()
