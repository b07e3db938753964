"""A storm over real processes: servers killed, frozen, cut off and stalled at random, and not one answer may be wrong.

    python tests/storm.py --minutes 3 [--clients 3] [--every 4] [--seed 0]

Five servers hold each of the four blocks of a tiny model three times; each is a process behind a proxy of ours. Every
`--every` seconds on average one of them is killed (and started again), frozen, cut (its connections break), or stalled
(its connections stay and carry nothing). Never are all copies of a block hit at once, so every operation must succeed.
Clients generate greedily, sampled, with beams and with drafts, hold conversations of two turns in one session, and
train; each result is compared with the unsplit model. Fails when any is wrong or fails, takes longer than `LONGEST_S`,
or when a server's cache is not free again at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trio

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.soak import BLOCKS, HIDDEN, NEW_TOKENS, VOCABULARY, make_model
from petals import AutoDistributedModelForCausalLM, GenerationOptions, PeerConfig, Timeouts, open_peer
from petals.models.client.local import LocalChain
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from petals.peer.client.model_client import ModelClient
from petals.peer.node import Peer

SPANS = (range(2), range(2), range(2, 4), range(2, 4), range(4))
LONGEST_S = 90.0
"""One operation, whatever happens meanwhile."""
AWAY_S = (0.5, 12.0)
"""How long a server is frozen or stalled; beyond 10 s it is taken for dead."""
START_S = 120.0
SETTLE_S = 60.0
FAULTS = ("kill", "freeze", "cut", "stall")
OPERATIONS = ("greedy", "sampled", "beams", "drafts", "chat", "train")


@dataclass(eq=False)
class Proxy:
    """Stands before one server; all connections that others open to it pass here."""

    target: int
    port: int = 0
    flowing: trio.Event = field(default_factory=trio.Event)
    scopes: set[trio.CancelScope] = field(default_factory=set)
    cuts: int = 0

    def cut(self) -> int:
        """Break every connection; how many there were."""
        count = len(self.scopes)
        for scope in self.scopes:
            scope.cancel()
        return count

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self.flowing.set()
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        await trio.serve_listeners(self._pass, [listener], task_status=task_status)  # type: ignore[arg-type]

    async def _pass(self, near: trio.SocketStream) -> None:
        with trio.CancelScope() as scope:
            self.scopes.add(scope)
            try:
                far = await trio.open_tcp_stream("127.0.0.1", self.target)
                async with far, trio.open_nursery() as nursery:
                    nursery.start_soon(self._copy, near, far, scope)
                    nursery.start_soon(self._copy, far, near, scope)
            except OSError:
                pass  # the server is not there
            finally:
                self.scopes.discard(scope)

    async def _copy(self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            while data := await source.receive_some(65536):
                await self.flowing.wait()
                await sink.send_all(data)
        except trio.BrokenResourceError:
            pass
        scope.cancel()


@dataclass(eq=False)
class Server:
    """One process, started again whenever it was killed."""

    blocks: range
    port: int
    proxy: Proxy
    process: trio.Process | None = None
    peer_id: str = ""
    healthy: bool = False


@dataclass
class Storm:
    """What goes on, and what was counted."""

    options: argparse.Namespace
    directory: Path
    truth: Any
    bootstrap: str
    rng: random.Random
    asker: Peer
    client_of_asker: ModelClient
    chain: LocalChain
    servers: list[Server] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    known: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)

    # -- servers and what befalls them ------------------------------------------------------------------------------

    async def keep(self, server: Server) -> None:
        """One server, for as long as the storm lasts."""
        words = [
            sys.executable, "-m", "petals.cli.main", "peer", str(self.directory), "--json", "--no_mdns",
            "--serve", f"{server.blocks.start}:{server.blocks.stop}", "--throughput", "100", "--cache_mb", "16",
            "--listen", f"/ip4/127.0.0.1/tcp/{server.port}", "--announce", f"/ip4/127.0.0.1/tcp/{server.proxy.port}",
            "--initial_peers", self.bootstrap,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        while True:
            process = await trio.lowlevel.open_process(
                words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
            server.process = process
            try:
                assert process.stdout is not None
                line = b""
                while not line.endswith(b"\n") and (piece := await process.stdout.receive_some()):
                    line += piece
                if line:
                    server.peer_id, server.healthy = json.loads(line)["peer_id"], True
                await process.wait()
            finally:
                server.healthy = False
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
            self.done["restarted"] += 1

    def spare(self) -> list[Server]:
        """Servers without which every block is still held by a healthy one."""

        def covered(without: Server) -> bool:
            rest = [each for each in self.servers if each.healthy and each is not without]
            return all(any(block in each.blocks for each in rest) for block in range(BLOCKS))

        return [each for each in self.servers if each.healthy and covered(each)]

    async def faults(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.sleep(self.rng.expovariate(1 / self.options.every))
            if victims := self.spare():
                victim, fault = self.rng.choice(victims), self.rng.choice(FAULTS)
                nursery.start_soon(self.hit, victim, fault, self.rng.uniform(*AWAY_S))

    async def hit(self, server: Server, fault: str, away_s: float) -> None:
        process = server.process
        assert process is not None
        self.done[fault] += 1
        if fault == "kill":
            server.healthy = False
            process.kill()
        elif fault == "cut":
            self.done["connections cut"] += server.proxy.cut()
        else:
            server.healthy = False
            if fault == "freeze":
                process.send_signal(signal.SIGSTOP)
            else:
                server.proxy.flowing = trio.Event()
            try:
                await trio.sleep(away_s)
            finally:
                server.proxy.flowing.set()
                if process.returncode is None:
                    process.send_signal(signal.SIGCONT)
            server.healthy = process.returncode is None

    # -- clients ----------------------------------------------------------------------------------------------------

    async def client(self, seed: int, until: float) -> None:
        rng = random.Random(seed)
        operations: tuple[Callable[[random.Random], Awaitable[None]], ...] = (
            self.greedy, self.sampled, self.beams, self.drafts, self.chat, self.train,
        )  # fmt: skip
        while trio.current_time() < until:
            operation = rng.choice(operations)
            began = trio.current_time()
            name = operation.__name__
            try:
                with trio.fail_after(LONGEST_S):
                    await operation(rng)
                self.done[name] += 1
                self.seconds.append(trio.current_time() - began)
            except (AssertionError, Exception) as error:
                self.wrong.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def prompt(self, rng: random.Random) -> list[int]:
        """As the soak's: no word of the answers is a near tie."""
        first, length = rng.randrange(12), rng.choice((3, 40))
        return [1 + (first * 17 + index * 29) % (VOCABULARY - 1) for index in range(length)]

    def at_home(self, prompt: list[int], *, new: int = NEW_TOKENS, **how: Any) -> list[int]:
        place = (tuple(prompt), new, *sorted(how.items()))
        if place not in self.known:
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            output = self.truth.generate(ids, attention_mask=mask, max_new_tokens=new, **{"do_sample": False, **how})
            self.known[place] = output[0, len(prompt) :].tolist()
        return self.known[place]

    async def stream(self, prompt: list[int], **how: Any) -> list[int]:
        options = GenerationOptions(max_new_tokens=NEW_TOKENS, **how)
        async with await self.asker.generate(prompt, options=options) as stream:
            return [token.id async for token in stream]

    async def model(self) -> Any:
        return await AutoDistributedModelForCausalLM.afrom_pretrained(peer=self.asker)

    async def greedy(self, rng: random.Random) -> None:
        prompt = self.prompt(rng)
        assert await self.stream(prompt) == self.at_home(prompt), f"after {prompt}"

    async def sampled(self, rng: random.Random) -> None:
        prompt, seed = self.prompt(random.Random(rng.randrange(3))), rng.randrange(3)
        said = await self.stream(prompt, temperature=0.8, top_p=0.9, seed=seed)
        assert said == self.known.setdefault(("sampled", *prompt, seed), said), f"after {prompt}, seed {seed}"

    async def _generate(self, prompt: list[int], **how: Any) -> list[int]:
        ids = torch.tensor([prompt])
        said = await (await self.model()).agenerate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **how
        )
        return list(said[0, len(prompt) :].tolist())

    async def beams(self, rng: random.Random) -> None:
        prompt = self.prompt(rng)
        assert await self._generate(prompt, num_beams=3) == self.at_home(prompt, num_beams=3), f"after {prompt}"

    async def drafts(self, rng: random.Random) -> None:
        prompt = self.prompt(rng)
        said = await self._generate(prompt, prompt_lookup_num_tokens=3)
        assert said == self.at_home(prompt), f"after {prompt}"

    async def chat(self, rng: random.Random) -> None:
        """Two turns in one session."""
        first, then = self.prompt(rng), [1 + rng.randrange(10) for _ in range(3)]
        model = await self.model()
        async with model.ainference_session(max_length=len(first) + len(then) + 2 * NEW_TOKENS) as session:
            said = await model.agenerate(
                torch.tensor([first]), max_new_tokens=NEW_TOKENS, do_sample=False, session=session
            )
            expected = self.at_home(first)
            assert said[0, -NEW_TOKENS:].tolist() == expected, f"after {first}"
            more = await model.agenerate(torch.tensor([then]), max_new_tokens=4, do_sample=False, session=session)
            assert more[0, -4:].tolist() == self.at_home([*first, *expected, *then], new=4), f"after {first}, {then}"

    async def train(self, rng: random.Random) -> None:
        """Forward and backward through all blocks."""
        model, chain = await self.model(), self.chain
        hidden = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(rng.randrange(100)))

        def both() -> None:
            mine, yours = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
            ours, theirs = model.model.layers(mine), chain.forward(yours)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            ours.square().sum().backward()
            theirs.square().sum().backward()
            torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-3, atol=1e-3)

        await self.asker.portal.run_sync(both)

    # -- the whole --------------------------------------------------------------------------------------------------

    async def weather(self) -> None:
        """Servers up, faults for so many minutes, calm, and a look at what is left."""
        async with trio.open_nursery() as nursery:
            for blocks in SPANS:
                server = Server(blocks, _free_port(), Proxy(0))
                server.proxy.target = server.port
                await nursery.start(server.proxy.run)
                self.servers.append(server)
                nursery.start_soon(self.keep, server)
            with trio.fail_after(START_S):
                while not all(server.healthy for server in self.servers):  # noqa: ASYNC110
                    await trio.sleep(0.05)
            await self.sampled_before()
            full = await self.full_room()
            until = trio.current_time() + 60 * self.options.minutes
            async with trio.open_nursery() as bad:
                bad.start_soon(self.faults, bad)
                async with trio.open_nursery() as clients:
                    for number in range(self.options.clients):
                        clients.start_soon(self.client, 1000 * self.options.seed + number, until)
                bad.cancel_scope.cancel()
            await self.calm(full)
            nursery.cancel_scope.cancel()

    async def sampled_before(self) -> None:
        """The truth of `sampled`, and of whether anything works at all."""
        for which in range(3):
            for seed in range(3):
                prompt = self.prompt(random.Random(which))
                said = await self.stream(prompt, temperature=0.8, top_p=0.9, seed=seed)
                self.known["sampled", *prompt, seed] = said

    async def full_room(self) -> dict[int, int]:
        """Tokens that an unused cache has room for, by number of blocks."""
        with trio.fail_after(START_S):
            while len(self.room()) < len(SPANS):
                await self.client_of_asker.watcher.changed(1.0)
        return {blocks: max(left for b, left in self.room().values() if b == blocks) for blocks in map(len, SPANS)}

    def room(self) -> dict[str, tuple[int, int]]:
        """Of each server that is known: blocks, and tokens that its cache has room for."""
        records = [offer.record for offer in self.client_of_asker.watcher.view.offers]
        return {record.peer_id: (len(record.blocks), record.cache_tokens_left) for record in records}

    async def calm(self, full: dict[int, int]) -> None:
        """All servers are back and their caches free again; `full`: tokens of room by number of blocks."""
        with trio.move_on_after(SETTLE_S):
            while True:
                room = self.room()
                if len(room) >= len(SPANS) and all(left >= full[blocks] for blocks, left in room.values()):
                    return
                await self.client_of_asker.watcher.changed(1.0)
        self.wrong.append(f"after {SETTLE_S:g} s of calm (blocks, room): {self.room()}, full are {full}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def storm(options: argparse.Namespace, directory: Path, truth: Any) -> Storm:
    """All of it."""
    timeouts = Timeouts(step_s=20.0, min_step_s=3.0, open_s=5.0, connect_s=2.0, route_s=30.0)
    common: dict[str, Any] = {"model": str(directory), "timeouts": timeouts, "keep_alive_s": 5.0}
    async with (
        open_peer(PeerConfig(**common), progress=lambda _: None) as bootstrap,
        open_peer(
            PeerConfig(listen=(), initial_peers=bootstrap.addrs, update_s=2.0, **common), progress=lambda _: None
        ) as asker,
    ):
        chain = LocalChain([load_span(open_checkpoint(directory), range(BLOCKS))])
        client = await asker.client()
        made = Storm(options, directory, truth, bootstrap.addrs[0], random.Random(options.seed), asker, client, chain)
        await made.weather()
        return made


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between faults, on average")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def main() -> int:
    """Run and print."""
    options = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        truth = make_model(Path(directory))
        made = trio.run(storm, options, Path(directory), truth)
    count = sum(made.done[name] for name in OPERATIONS)
    print(f"seed {options.seed}, {options.minutes:g} minutes, {options.clients} clients")
    print("faults:", ", ".join(f"{made.done[name]} x {name}" for name in (*FAULTS, "connections cut", "restarted")))
    print("operations:", ", ".join(f"{made.done[name]} x {name}" for name in OPERATIONS))
    seconds = sorted(made.seconds) or [0.0]
    print(
        f"{count} right, {len(made.wrong)} wrong; seconds of one: median {statistics.median(seconds):.2f}, "
        f"95th percentile {seconds[int(0.95 * (len(seconds) - 1))]:.2f}, longest {seconds[-1]:.1f}"
    )
    print("\n".join(made.wrong))
    return bool(made.wrong) or not count


if __name__ == "__main__":
    sys.exit(main())
