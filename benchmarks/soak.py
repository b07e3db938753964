"""Random clients, servers that come and go, faults: for as long as one likes. Nothing may be wrong, nothing may stay.

    python benchmarks/soak.py --minutes 60 [--clients 4] [--churn 15] [--rest 0] [--seed 0]

One process holds a server of all blocks (slow by its own word, so that others are preferred) and the peer that asks;
other servers are processes that are started, killed, stopped politely, frozen and thawed, one of these every `--churn`
seconds on average. Clients generate greedily, sampled and with beams, hang up in the middle of a word, roll sessions
back, train, lose connections and leave half-said messages behind. Now and then all of them pause: then what they left
behind is counted. Fails when any token or gradient is wrong, when leases, sessions, tasks, streams or descriptors stay,
or when memory at the pauses grows by more than `--growth` MiB a minute, by linear regression over the second half.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import trio
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from petals import AutoDistributedModelForCausalLM, PeerConfig, ServeConfig, Timeouts, open_peer
from petals.models.client.local import LocalChain
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import load_span
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.node import Peer
from petals.protocols.errors import SwarmError
from petals.protocols.framing import encode_varint
from petals.protocols.inference import INFERENCE_V1

BLOCKS, VOCABULARY, HIDDEN = 4, 199, 32
SPANS = ("0:4", "0:2", "2:4", "1:3", "0:1", "3:4")
MOST_SERVERS = 4
NEW_TOKENS = 24
SETTLE_S = 30.0
"""What the server is given to notice that everybody has gone."""
SAMPLES = [(which, seed) for which in range(3) for seed in range(3)]


def make_model(directory: Path) -> Any:
    """A tiny Llama whose likeliest tokens vary, and a tokenizer of numbers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    model.save_pretrained(directory)
    words = Tokenizer(WordLevel({f"t{number}": number for number in range(VOCABULARY)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(directory)
    return model


@dataclass
class Soak:
    """What goes on, and what was counted."""

    options: argparse.Namespace
    directory: Path
    truth: Any
    stable: Peer
    asker: Peer
    chain: LocalChain
    dice: random.Random
    done: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    servers: dict[str, trio.Process] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    working: int = 0
    paused: trio.Event | None = None
    quiet: list[tuple[float, float]] = field(default_factory=list)
    """(minutes, MiB) at each pause."""
    known: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)

    # -- clients -------------------------------------------------------------------------------------------------------

    async def client(self, seed: int) -> None:
        """One client, doing this and that until cancelled."""
        dice = random.Random(seed)
        doings = (
            self.greedy, self.greedy, self.sampled, self.beams, self.hang_up, self.roll_back, self.train, self.fault,
        )  # fmt: skip
        while True:
            if self.options.rest:
                await trio.sleep(dice.uniform(0, 2 * self.options.rest))
            while self.paused is not None:
                await self.paused.wait()
            doing = dice.choice(doings)
            self.working += 1
            try:
                await doing(dice)
                self.done[doing.__name__] += 1
            finally:
                self.working -= 1

    def prompt(self, dice: random.Random) -> list[int]:
        """One of 24, so that kept prefixes are met too. None of their words is a near tie, which rounding might
        decide: the likeliest is ahead by 8e-4 at least."""
        first, length = dice.randrange(12), dice.choice((3, 40))
        return [1 + (first * 17 + index * 29) % (VOCABULARY - 1) for index in range(length)]

    async def generate(self, prompt: list[int], most: int, **how: Any) -> list[int]:
        """Tokens from the swarm, at most `most`; then it hangs up."""
        said: list[int] = []
        options = GenerationOptions(max_new_tokens=NEW_TOKENS, **how)
        async with await self.asker.generate(prompt, options=options) as stream:
            async for token in stream:
                said.append(token.id)
                if len(said) >= most:
                    break
        self.tokens += len(said)
        return said

    def at_home(self, prompt: list[int], **how: Any) -> list[int]:
        """The same by the unsplit model."""
        place = (tuple(prompt), *sorted(how.items()))
        if place not in self.known:
            ids = torch.tensor([prompt])
            output = self.truth.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **how
            )
            self.known[place] = output[0, len(prompt) :].tolist()
        return self.known[place]

    async def greedy(self, dice: random.Random) -> None:
        prompt = self.prompt(dice)
        said, expected = await self.generate(prompt, NEW_TOKENS), self.at_home(prompt)
        assert said == expected, f"greedy, after {prompt}: {said} instead of {expected}"

    async def hang_up(self, dice: random.Random) -> None:
        """In the middle of an answer, at any moment."""
        prompt, most = self.prompt(dice), dice.randrange(1, NEW_TOKENS)
        with trio.move_on_after(dice.uniform(0.01, 0.5)):
            said = await self.generate(prompt, most)
            assert said == self.at_home(prompt)[:most]

    async def sampled(self, dice: random.Random) -> None:
        """With the same dice the same words as one server said alone, before anything happened (`first_samples`)."""
        which, seed = dice.choice(SAMPLES)
        prompt = self.prompt(random.Random(which))
        said = await self.generate(prompt, NEW_TOKENS, temperature=0.8, top_p=0.9, seed=seed)
        assert said == self.known.setdefault((which, seed), said), "sampled: other words"

    async def first_samples(self) -> None:
        """The truth of `sampled`."""
        dice = random.Random(0)
        while len([place for place in self.known if place in SAMPLES]) < len(SAMPLES):
            await self.sampled(dice)

    async def beams(self, dice: random.Random) -> None:
        prompt = self.prompt(dice)
        model = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=self.asker)
        ids = torch.tensor([prompt])
        said = await model.agenerate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, num_beams=3, do_sample=False
        )
        self.tokens += NEW_TOKENS
        assert said[0, len(prompt) :].tolist() == self.at_home(prompt, num_beams=3), "beams: other words"

    async def roll_back(self, dice: random.Random) -> None:
        """A session by hand: some steps, back, and on, compared with the blocks at home."""
        client = await self.asker.client()
        generator = torch.Generator().manual_seed(dice.randrange(1 << 30))
        steps = [torch.randn(1, dice.choice((1, 3)), HIDDEN, generator=generator) for _ in range(6)]
        remote = await client.open_session(client.blocks, 1, 32)
        local = self.chain.open_session(batch_size=1, max_length=32)
        try:
            for step in steps:
                if dice.random() < 0.3:
                    position = dice.randrange(local.position + 1)
                    local.position = position
                    remote.rollback(position)
                torch.testing.assert_close(await remote.step(step), local.step(step), rtol=1e-4, atol=1e-4)
        finally:
            await remote.close()

    async def train(self, dice: random.Random) -> None:
        """Forward and backward through some of the blocks."""
        model = await AutoDistributedModelForCausalLM.afrom_pretrained(peer=self.asker)
        start = dice.randrange(BLOCKS - 1)
        blocks = slice(start, dice.randrange(start + 1, BLOCKS + 1))
        hidden = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(dice.randrange(100)))

        def both() -> None:
            mine, yours = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
            ours = model.model.layers[blocks](mine)
            theirs = self.chain.slice(range(blocks.start, blocks.stop)).forward(yours)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            ours.square().sum().backward()
            theirs.square().sum().backward()
            torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-3, atol=1e-3)

        await self.asker.portal.run_sync(both)

    async def fault(self, dice: random.Random) -> None:
        """A connection lost, or a stream that says half of something and is left."""
        if dice.random() < 0.5:
            others = [peer for peer in self.asker.host.connected_peers() if peer != self.stable.peer_id]
            if others:
                await self.asker.host.disconnect(dice.choice(others))
            return
        with suppress(SwarmError):
            stream = await self.asker.host.open_stream(self.stable.peer_id, INFERENCE_V1)
            await stream.write(encode_varint(dice.choice((50, 1 << 15, 1 << 40))) + b"\x0a\x05half")
            await (stream.reset() if dice.random() < 0.5 else stream.close())

    # -- servers -------------------------------------------------------------------------------------------------------

    async def churn(self, nursery: trio.Nursery) -> None:
        """Servers come and go."""
        while True:
            await trio.sleep(self.dice.expovariate(1 / self.options.churn))
            for name, process in list(self.servers.items()):
                if process.returncode is not None:
                    del self.servers[name]
            alive = [name for name in self.servers if name not in self.frozen]
            event = self.dice.choice(("start", "start", "kill", "stop", "freeze", "thaw"))
            if event == "start" or not self.servers:
                if len(self.servers) < MOST_SERVERS:
                    nursery.start_soon(self.serve)
            elif event == "thaw" and self.frozen:
                self.hit(self.dice.choice(sorted(self.frozen)), signal.SIGCONT, event)
            elif event in ("kill", "stop", "freeze") and alive:
                signs = {"kill": signal.SIGKILL, "stop": signal.SIGTERM, "freeze": signal.SIGSTOP}
                self.hit(self.dice.choice(sorted(alive)), signs[event], event)

    def hit(self, name: str, sign: signal.Signals, event: str) -> None:
        self.servers[name].send_signal(sign)
        self.done[event] += 1
        if event == "freeze":
            self.frozen.add(name)
        self.frozen -= {name} if event == "thaw" else set()

    async def serve(self) -> None:
        """One server's life."""
        words = [
            sys.executable, "-m", "petals.cli.main", "peer", str(self.directory), "--serve", self.dice.choice(SPANS),
            "--throughput", "100", "--cache_mb", "16", "--initial_peers", self.stable.addrs[0], "--json",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = await trio.lowlevel.open_process(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        self.servers[str(process.pid)] = process
        self.done["start"] += 1
        try:
            await process.wait()
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            self.frozen.discard(str(process.pid))

    # -- what is left --------------------------------------------------------------------------------------------------

    async def pauses(self, began: float) -> None:
        """Stop all clients now and then, and count what they left."""
        while True:
            await trio.sleep(self.options.pause)
            await self.pause(began)

    async def pause(self, began: float) -> None:
        self.paused = trio.Event()
        while self.working:  # noqa: ASYNC110  # clients finish what they are at; frozen servers cost them seconds
            await trio.sleep(0.05)
        await self.settled()
        self.quiet.append(((time.perf_counter() - began) / 60, psutil.Process().memory_info().rss / 2**20))
        event, self.paused = self.paused, None
        event.set()

    async def settled(self) -> None:
        """Every lease and session of the stable server has come back; so have all mailboxes and handlers."""
        assert self.stable.server is not None
        budget, inbound = self.stable.server.budget, self.stable.server.inbound
        with trio.move_on_after(SETTLE_S):
            while budget.left_bytes < budget.total_bytes or inbound.sessions or inbound._mailboxes:  # noqa: ASYNC110
                await trio.sleep(0.05)
            return
        whose = {"the asker" if peer == self.asker.peer_id else peer: n for peer, n in inbound._sessions.items()}
        held = budget.total_bytes - budget.left_bytes
        raise Left(f"{held} bytes leased, sessions {whose}, after {SETTLE_S:g} s\n" + "\n".join(stacks()))


class Left(Exception):
    """Something stayed that should have gone."""


def stacks() -> list[str]:
    """Where every task that has to do with a session stands."""
    found: list[str] = []

    def look(task: trio.lowlevel.Task) -> None:
        frames = [f"{frame.f_code.co_name}:{line}" for frame, line in task.iter_await_frames()]
        if any(name in " ".join(frames) for name in ("session", "generat", "answer_", "step")):
            found.append(" < ".join(reversed(frames)))
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                look(child)

    root = trio.lowlevel.current_root_task()
    assert root is not None
    look(root)
    return found


def tasks() -> int:
    """All of this run."""

    def count(task: trio.lowlevel.Task) -> int:
        return 1 + sum(count(child) for nursery in task.child_nurseries for child in nursery.child_tasks)

    root = trio.lowlevel.current_root_task()
    assert root is not None
    return count(root)


def streams(peer: Peer) -> int:
    """Open on all of its connections."""
    conns: Any = peer.host._network.get_connections()
    return sum(len(conn.muxed_conn.connection.session.streams) for conn in conns)


async def at_rest(soak: Soak) -> tuple[int, int, int]:
    """(tasks, streams, descriptors) once they do not fall any more."""
    least = (1 << 30, 1 << 30, 1 << 30)
    since = trio.current_time()
    while trio.current_time() - since < 3:
        seen = (tasks(), streams(soak.stable) + streams(soak.asker), psutil.Process().num_fds())
        if any(now < before for now, before in zip(seen, least, strict=True)):
            least = tuple(map(min, seen, least))  # type: ignore[assignment]
            since = trio.current_time()
        await trio.sleep(0.05)
    return least


def slope(samples: list[tuple[float, float]]) -> float:
    """MiB a minute over the second half; the first is warming up."""
    half = samples[len(samples) // 2 :]
    return statistics.linear_regression(*zip(*half, strict=True)).slope if len(half) > 2 else 0.0


async def run(options: argparse.Namespace, directory: Path, truth: Any) -> dict[str, Any]:
    """All of it. Raises when anything is wrong; returns the figures."""
    serve = ServeConfig(blocks=range(BLOCKS), throughput=1.0, cache_bytes=64 << 20, announce_s=5.0, prefix_idle_s=20.0)
    timeouts = Timeouts(step_s=20.0, min_step_s=3.0, open_s=5.0, connect_s=2.0)
    common = {"model": str(directory), "timeouts": timeouts, "keep_alive_s": 3.0, "update_s": 2.0}
    async with (
        open_peer(PeerConfig(serve=serve, **common), progress=lambda _: None) as stable,
        open_peer(PeerConfig(initial_peers=stable.addrs, **common), progress=lambda _: None) as asker,
    ):
        chain = LocalChain([load_span(open_checkpoint(directory), range(BLOCKS))])
        soak = Soak(options, directory, truth, stable, asker, chain, random.Random(options.seed))
        await soak.first_samples()
        for warm in (soak.greedy, soak.beams, soak.roll_back, soak.train):
            await warm(random.Random(0))
        before = await at_rest(soak)
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(soak.churn, nursery)
            for _ in range(2):
                nursery.start_soon(soak.serve)
            nursery.start_soon(soak.pauses, began)
            for number in range(options.clients):
                nursery.start_soon(soak.client, options.seed * 1000 + number)
            await trio.sleep(60 * options.minutes)
            nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await soak.settled()
        for peer in (stable, asker):
            for other in set(peer.host.connected_peers()) - {stable.peer_id, asker.peer_id}:
                await peer.host.disconnect(other)
        after = await at_rest(soak)
        resident = [round(mib) for _, mib in soak.quiet]
        return {
            "minutes": round((time.perf_counter() - began) / 60, 1), "done": dict(soak.done), "tokens": soak.tokens,
            "before": before, "after": after, "resident_mib": resident, "mib_per_minute": round(slope(soak.quiet), 2),
        }  # fmt: skip


def judge(figures: dict[str, Any], growth: float) -> list[str]:
    """What must not be."""
    names = ("tasks", "streams", "descriptors")
    left = [
        f"{name}: {after} instead of {before}"
        for name, before, after in zip(names, figures["before"], figures["after"], strict=True)
        if after > before
    ]
    if not figures["tokens"] or figures["done"]["start"] < 2:
        left.append("nothing was generated, or no servers came: that proves nothing")
    grows = figures["mib_per_minute"] > growth
    return left + [f"memory grows by {figures['mib_per_minute']} MiB a minute"] * grows


def soak(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Figures, and what is wrong with them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        truth = make_model(Path(directory))
        figures = trio.run(partial(run, options, Path(directory), truth))
    return figures, judge(figures, options.growth)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--churn", type=float, default=15.0, help="seconds between events, on average")
    parser.add_argument("--rest", type=float, default=0.0, help="seconds that a client does nothing, on average")
    parser.add_argument("--pause", type=float, default=20.0, help="seconds between looks at what is left")
    parser.add_argument("--growth", type=float, default=1.0, help="MiB a minute that memory may grow by")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def main() -> int:
    """Run and print."""
    figures, wrong = soak(parse())
    for name, value in figures.items():
        print(f"{name}: {value}")
    print("\n".join(wrong) or "nothing wrong, nothing left")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
