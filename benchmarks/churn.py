"""The directory under churn, a process for each host: what lookups cost, and whom they miss or list dead.

Servers announce signed records as `petals peer --serve` does, and die by SIGKILL; readers look up again and again
meanwhile, some of them long there, some fresh. Beside them a plain socket echoes every 20 ms: what the machine itself
has to offer. Processes are forked from one that has imported everything, so that no import is measured.

Run: python benchmarks/churn.py [--peers 50] [--readers 4] [--events 30] [--storms 2]
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import psutil
import trio

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.directory import MODEL, record_of
from petals.dht.records import ServerState, sign_record
from petals.peer.base.identity import create_identity
from petals.peer.membership.joining import open_membership
from petals.peer.membership.record_exchange import answer_info
from petals.peer.net.host import HostConfig
from petals.peer.server.announcer import Announcer
from petals.protocols.info import INFO_V1
from petals.protocols.stream import ByteStream
from petals.protocols.types import PeerId

LOOPBACK = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
ANNOUNCE_S = 30.0
LOOK_PAUSE_S = 0.5
"""A real client looks up every 15 s; these do it thirty times as often."""
ECHO_PAUSE_S = 0.02


PRELOADED = [
    "psutil",
    "petals.peer.membership.joining",
    "petals.peer.server.announcer",
    "petals.peer.membership.record_exchange",
]
"""Imported once, by the process that all others are forked from (of itself it should import the main module, but Python
3.11 does not)."""


# -- what the processes do -------------------------------------------------------------------------------------------


async def serve(pipe: Connection, addr: str | None) -> NoReturn:
    """A server without blocks. Says who it is as soon as it is there, and again when it has announced itself."""
    identity = create_identity()
    async with open_membership(identity, LOOPBACK, [addr] if addr else []) as (host, directory, nursery, _):
        announcer = Announcer(directory, partial(record_of, host), every_s=ANNOUNCE_S)

        async def answer(stream: ByteStream) -> None:
            await answer_info(
                lambda _: [sign_record(announcer.record(), identity.sign, identity.public_key)],
                stream,
            )

        host.set_handler(INFO_V1, answer)
        pipe.send((host.peer_id, host.addrs[0]))
        await announcer.enter(ServerState.ONLINE)
        pipe.send(time.monotonic())
        nursery.start_soon(announcer.run)
        await trio.sleep_forever()
    raise AssertionError("nobody ends it but from outside")


async def read(pipe: Connection, addr: str | None) -> NoReturn:
    """A client that looks up for ever and sends each `Look`."""
    late_s = 0.0

    async def note_late() -> None:
        nonlocal late_s
        while True:
            due = time.monotonic() + ECHO_PAUSE_S
            await trio.sleep(ECHO_PAUSE_S)
            late_s = max(late_s, time.monotonic() - due)

    async with open_membership(create_identity(), LOOPBACK, [addr] if addr else []) as (_, directory, nursery, _):
        nursery.start_soon(note_late)
        while True:
            late_s, started, cpu, queued = 0.0, time.monotonic(), time.process_time(), queued_s()
            records = await directory.lookup(MODEL)
            found = frozenset(record.peer_id for record in records)
            ended, cpu, queued = time.monotonic(), time.process_time() - cpu, queued_s() - queued
            pipe.send(Look(os.getpid(), started, ended, cpu, queued, late_s, found))
            await trio.sleep(LOOK_PAUSE_S)
    raise AssertionError("nobody ends it but from outside")


async def echo(pipe: Connection, _: str | None) -> NoReturn:
    """Echoes on a port of its own, which it sends."""

    async def answer(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        pipe.send(listener.socket.getsockname()[1])
    raise AssertionError("nobody ends it but from outside")


async def knock(pipe: Connection, port: str | None) -> NoReturn:
    """Sends when it has asked `echo`, and how long the answer took."""
    async with await trio.open_tcp_stream("127.0.0.1", int(port or 0)) as stream:
        while True:
            started = time.monotonic()
            await stream.send_all(bytes(64))
            await stream.receive_some()
            pipe.send((started, time.monotonic() - started))
            await trio.sleep(ECHO_PAUSE_S)
    raise AssertionError("nobody ends it but from outside")


Task = Callable[[Connection, str | None], Coroutine[Any, Any, NoReturn]]
TASKS: dict[str, Task] = {"serve": serve, "read": read, "echo": echo, "knock": knock}


def live(pipe: Connection, task: str) -> None:
    """A process: waits for the word to begin, with the address to join, then does its task until it is killed, or until
    nobody is there any more to kill it."""
    pipe.send("ready")
    with suppress(EOFError):
        trio.run(until_alone, TASKS[task], pipe, pipe.recv())


async def until_alone(task: Task, pipe: Connection, addr: str | None) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(task, pipe, addr)
        await trio.lowlevel.wait_readable(pipe.fileno())  # no other word comes but the end
        os._exit(0)


# -- what is seen of them --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """One lookup; times are of the clock that all processes share."""

    reader: int
    started: float
    ended: float
    cpu_s: float
    """Of the reader's process."""
    queued_s: float
    """For which the reader's process could have worked, had a core been free."""
    late_s: float
    """The longest that a sleeping task of the reader was woken too late meanwhile."""
    found: frozenset[PeerId]

    @property
    def seconds(self) -> float:
        return self.ended - self.started


@dataclass
class Life:
    """When a server could be expected in answers: must be from `announced` to `struck`, must not be after `dead`."""

    announced: float = math.inf
    struck: float = math.inf
    dead: float = math.inf

    def must_be_in(self, look: Look) -> bool:
        return self.announced < look.started and look.ended < self.struck

    def must_not_be_in(self, look: Look) -> bool:
        return self.dead < look.started


@dataclass(eq=False)
class Child:
    """A process of ours."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    peer_id: PeerId = field(default=PeerId(""))
    addr: str = ""

    async def receive(self) -> Any:
        await trio.lowlevel.wait_readable(self.pipe.fileno())
        return self.pipe.recv()

    async def kill(self) -> None:
        """SIGKILL: not a word of goodbye."""
        self.process.kill()
        await trio.lowlevel.wait_readable(self.process.sentinel)


@dataclass
class Scene:
    """The swarm, its readers, and everything seen of both."""

    nursery: trio.Nursery
    children: list[Child]
    servers: list[Child] = field(default_factory=list)
    lives: dict[PeerId, Life] = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)
    firsts: list[Look] = field(default_factory=list)
    """Of each reader, the first lookup."""
    echoes: list[tuple[float, float]] = field(default_factory=list)
    looked: trio.Event = field(default_factory=trio.Event)

    async def spawn(self, task: str) -> Child:
        """A process that has imported everything and waits for its word."""
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(PRELOADED)
        ours, theirs = forks.Pipe()
        process = forks.Process(target=live, args=(theirs, task), daemon=True)
        process.start()
        theirs.close()
        child = Child(process, ours)
        self.children.append(child)
        assert await child.receive() == "ready"
        return child

    async def join(self, addr: str | None, child: Child | None = None) -> None:
        """Let a server begin; returns when it has announced itself."""
        child = child or await self.spawn("serve")
        child.pipe.send(addr)
        child.peer_id, child.addr = await child.receive()
        self.lives[child.peer_id] = Life()
        self.servers.append(child)
        self.lives[child.peer_id].announced = await child.receive()

    async def begin_reading(self, child: Child, addr: str) -> None:
        """Let a reader begin; returns when it has looked up once."""
        child.pipe.send(addr)
        first = await child.receive()
        self.firsts.append(first)
        self.nursery.start_soon(self._note_looks, child)

    async def _note_looks(self, child: Child) -> None:
        while True:
            try:
                look = await child.receive()
            except (EOFError, ConnectionResetError):
                return  # a fresh reader has been sent away
            self.looks.append(look)
            self.looked.set()
            self.looked = trio.Event()

    async def knock(self) -> None:
        """Measure what a plain socket takes, from now on."""
        echoing, knocking = await self.spawn("echo"), await self.spawn("knock")
        echoing.pipe.send(None)
        knocking.pipe.send(str(await echoing.receive()))
        while True:
            self.echoes.append(await knocking.receive())

    async def kill(self, *servers: Child) -> None:
        """All of them at one moment."""
        struck = time.monotonic()
        for server in servers:
            self.servers.remove(server)
            self.lives[server.peer_id].struck = struck
        for server in servers:
            server.process.kill()
        for server in servers:
            await server.kill()
            self.lives[server.peer_id].dead = time.monotonic()

    async def all_agree(self, readers: list[Child], within_s: float) -> float:
        """Seconds until every one of `readers` has listed exactly those who live."""
        started = time.monotonic()
        alive = {server.peer_id for server in self.servers}
        left = {reader.process.pid for reader in readers}
        with trio.move_on_after(within_s):
            while left:
                looked = self.looked
                left -= {look.reader for look in self.looks if look.started > started and look.found == alive}
                if left:
                    await looked.wait()
            return time.monotonic() - started
        return math.inf

    @contextmanager
    def phase(self, what: str, threads: set[int]) -> Iterator[None]:
        """Print what was seen meanwhile; `threads` are the readers that count."""
        began, busy = time.monotonic(), busy_s()
        yield
        ended = time.monotonic()
        busy = (busy_s() - busy) / (ended - began) / (os.cpu_count() or 1)
        self.report(what, began, ended, busy, threads)

    def report(self, what: str, began: float, ended: float, busy: float, readers: set[int]) -> None:
        long_there = [look for look in self.looks if began <= look.started <= ended and look.reader in readers]
        fresh = [look for look in self.firsts if began <= look.started <= ended]
        echoes = [seconds for started, seconds in self.echoes if began <= started <= ended]
        say(f"{what} ({ended - began:.1f} s, cores {busy:.0%} busy)")
        for who, looks in (("long there", long_there), ("fresh", fresh)):
            if looks:
                say(f"    {who:10} {self.judge(looks, began)}")
        say(f"    plain echo {spread(echoes)}")

    def judge(self, looks: list[Look], began: float) -> str:
        """Times, and how many of those listed were dead, or of those alive not listed."""
        wanted = missed = new_missed = dead = 0
        for look in looks:
            for peer_id, life in self.lives.items():
                must = life.must_be_in(look)
                missing = must and peer_id not in look.found
                wanted += must
                missed += missing and life.announced < began
                new_missed += missing and life.announced >= began
                dead += life.must_not_be_in(look) and peer_id in look.found
        cpu_ms = 1e3 * statistics.median(look.cpu_s for look in looks)
        worst = max(looks, key=lambda look: look.seconds)
        return (
            f"{spread([look.seconds for look in looks])}; {cpu_ms:.0f} ms of CPU, in the worst "
            f"{1e3 * worst.cpu_s:.0f}, {1e3 * worst.queued_s:.0f} of waiting for a core and a task woken "
            f"{1e3 * worst.late_s:.0f} late; "
            f"of {wanted} holders {missed} missing, {new_missed} newcomers missing, {dead} dead listed"
        )


def say(line: str) -> None:
    print(line, flush=True)


def queued_s() -> float:
    """Seconds that the main thread of this process has waited for a core; 0 where the kernel does not say."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def busy_s() -> float:
    """Seconds that the cores have worked, together."""
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice + times.irq + times.softirq)


def spread(seconds: list[float]) -> str:
    """Median, 95th percentile and worst, and of how many."""
    if not seconds:
        return "none"
    ordered = sorted(1e3 * each for each in seconds)
    p95 = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]
    return f"{statistics.median(ordered):.4g} ms (p95 {p95:.4g}, worst {ordered[-1]:.4g}; {len(ordered)})"


# -- the play --------------------------------------------------------------------------------------------------------


async def play(*, peers: int, n_readers: int, events: int, storms: int, watch_s: float = 5.0) -> Scene:
    """All of it; prints as it goes. Returns what was seen."""
    children: list[Child] = []
    try:
        async with trio.open_nursery() as nursery:
            scene = Scene(nursery, children)
            nursery.start_soon(scene.knock)
            started = time.monotonic()
            await scene.join(None)
            for _ in range(peers - 1):
                await scene.join(random.choice(scene.servers).addr)
            say(f"{peers} peers joined one after another in {time.monotonic() - started:.1f} s")
            readers = [await scene.spawn("read") for _ in range(n_readers)]
            pids = {reader.process.pid or 0 for reader in readers}
            for reader in readers:
                await scene.begin_reading(reader, random.choice(scene.servers).addr)
            say(f"after {await scene.all_agree(readers, 60):.1f} s all {n_readers} readers listed all")
            with scene.phase("nothing happens", pids):
                await visited(scene, watch_s)
            if events:
                with scene.phase(f"{events} comings and goings", pids):
                    await churned(scene, events)
            for _ in range(storms):
                await stormed(scene, readers, pids, watch_s)
            nursery.cancel_scope.cancel()
        return scene
    finally:
        for child in children:
            child.process.kill()
        for child in children:
            child.process.join()
            child.pipe.close()


async def visited(scene: Scene, watch_s: float) -> None:
    """Three fresh readers come, one after another, over `watch_s`, look up once, and go."""
    for _ in range(3):
        fresh = await scene.spawn("read")
        await scene.begin_reading(fresh, random.choice(scene.servers).addr)
        await fresh.kill()
        await trio.sleep(watch_s / 3)


async def churned(scene: Scene, events: int) -> None:
    """Servers come and go without a word, one after another, as fast as they announce themselves."""
    for number in range(events):
        if number % 2:
            await scene.join(random.choice(scene.servers).addr)
        else:
            await scene.kill(random.choice(scene.servers))
        await trio.sleep(LOOK_PAUSE_S)
        if number % 10 == 5:
            await visited(scene, 0.0)


async def stormed(scene: Scene, readers: list[Child], pids: set[int], watch_s: float) -> None:
    """Half of the servers die at one moment; then as many join at one moment."""
    half = len(scene.servers) // 2
    with scene.phase(f"{half} of {len(scene.servers)} killed at one moment", pids):
        await scene.kill(*random.sample(scene.servers, half))
        await visited(scene, watch_s)
    newcomers = [await scene.spawn("serve") for _ in range(half)]
    staying = list(scene.servers)
    began = time.monotonic()
    with scene.phase(f"{half} joining {len(staying)} at one moment, until all have announced themselves", pids):
        async with trio.open_nursery() as joining:
            for newcomer in newcomers:
                joining.start_soon(scene.join, random.choice(staying).addr, newcomer)
            joining.start_soon(visited, scene, 0.0)
    waits = [scene.lives[newcomer.peer_id].announced - began for newcomer in newcomers]
    say(f"    newcomers had announced themselves after {spread(waits)}")
    with scene.phase("from then until every reader had listed all", pids):
        listed_s = await scene.all_agree(readers, 60)
    say(f"    all listed after {listed_s:.1f} s")
    with scene.phase("then", pids):
        await visited(scene, watch_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=50)
    parser.add_argument("--readers", type=int, default=4, help="long-lived clients")
    parser.add_argument("--events", type=int, default=30, help="comings and goings, one after another")
    parser.add_argument(
        "--storms", type=int, default=2, help="half killed at one moment, as many joining at one moment"
    )
    options = parser.parse_args()
    random.seed(0)
    trio.run(
        partial(
            play,
            peers=options.peers,
            n_readers=options.readers,
            events=options.events,
            storms=options.storms,
        )
    )


if __name__ == "__main__":
    main()
