"""Decoding over slow links: every connection between peers goes through a proxy that delays and throttles it.

    python benchmarks/network.py [--steps 30] [--links 1000:2.5 100:2.5 100:50]

Three servers of two blocks each and the client, with every pair of them the same distance apart. Each step is measured
with activations pushed from server to server and with every hop answering the client, in turns; as ratios to the same
run without delay, and to the floor: four one-way delays for three pushed hops, six for relayed ones, plus the time of
the undelayed run.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import trio
from servers import server
from transformers import AutoModelForCausalLM, LlamaConfig

from petals import PeerConfig, Timeouts, open_peer
from petals.peer.client.model_client import ClientOptions

HOPS = 3


@dataclass
class Link:
    """What every connection is like from now on."""

    bytes_per_s: float = float("inf")
    one_way_s: float = 0.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def carry(link: Link, source: trio.SocketStream, target: trio.SocketStream) -> None:
    """One direction of a connection: bytes arrive in order, late, and no faster than the link."""
    send, receive = trio.open_memory_channel[tuple[float, bytes]](10_000)

    async def deliver() -> None:
        async for due, data in receive:
            await trio.sleep_until(due)
            await target.send_all(data)
        await target.send_eof()

    async with trio.open_nursery() as nursery, send:
        nursery.start_soon(deliver)
        free_at = 0.0
        async for data in source:
            free_at = max(free_at, trio.current_time()) + len(data) / link.bytes_per_s
            await send.send((free_at + link.one_way_s, bytes(data)))
        await send.aclose()


async def proxy(link: Link, port: int, to_port: int) -> None:
    """Stands in front of one server's port."""

    async def connected(client: trio.SocketStream) -> None:
        try:
            async with await trio.open_tcp_stream("127.0.0.1", to_port) as target, trio.open_nursery() as nursery:
                nursery.start_soon(carry, link, client, target)
                nursery.start_soon(carry, link, target, client)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # one end left

    await trio.serve_tcp(connected, port, host="127.0.0.1")


async def measure(model: Path, options: argparse.Namespace) -> None:
    """Start everything, run, print."""
    link = Link()
    with ExitStack() as servers:
        async with trio.open_nursery() as nursery:
            joining: tuple[str, ...] = ()
            for hop in range(HOPS):
                real, shown = free_port(), free_port()
                nursery.start_soon(proxy, link, shown, real)
                words = (
                    str(model), "--serve", f"{2 * hop}:{2 * hop + 2}", "--cache_mb", "256",
                    "--listen", f"/ip4/127.0.0.1/tcp/{real}", "--announce", f"/ip4/127.0.0.1/tcp/{shown}", *joining,
                )  # fmt: skip
                starting = server(*words, threads=1)
                address = await trio.to_thread.run_sync(servers.enter_context, starting)
                joining = joining or ("--initial_peers", address)
            await compare(link, joining[1], model, options)
            nursery.cancel_scope.cancel()


async def compare(link: Link, address: str, model: Path, options: argparse.Namespace) -> None:
    """Both ways over every link."""
    config = PeerConfig(initial_peers=(address,), model=str(model), timeouts=Timeouts(route_s=60.0))
    async with open_peer(config, progress=lambda _: None) as peer:
        client = await peer.client()
        await client.ready()
        hidden = torch.randn(1, 1, options.hidden)
        base: dict[bool, float] = {}
        print(f"{HOPS} hops x 2 blocks, hidden {options.hidden}, {options.steps} steps, torch {torch.__version__}\n")
        print("| link | way | ms per step, median (min - max) | floor, ms | to the floor | to the undelayed run |")
        print("|---|---|---|---|---|---|")
        for megabits, delay_ms in [(float("inf"), 0.0), *options.links]:
            link.bytes_per_s, link.one_way_s = megabits * 1e6 / 8, delay_ms / 1e3
            for push in (True, False):
                wanted = ClientOptions(use_server_to_server=push)
                session = await client.open_session(client.blocks, 1, options.steps + 10, wanted)
                times: list[float] = []
                for index in range(options.steps + 5):
                    started = time.perf_counter()
                    await session.step(hidden)
                    if index >= 5:
                        times.append(1e3 * (time.perf_counter() - started))
                pushed = push and not session.unpushable
                await session.close()
                median = statistics.median(times)
                base.setdefault(push, median)
                floor = base[push] + ((HOPS + 1) if push else 2 * HOPS) * delay_ms
                name = "none" if not delay_ms else f"{megabits:g} Mbit/s, {2 * delay_ms:g} ms round trip"
                way = "pushed" if pushed else "relayed" if not push else "push failed"
                print(
                    f"| {name} | {way} | {median:.1f} ({min(times):.1f} - {max(times):.1f}) | {floor:.1f} | "
                    f"{median / floor:.2f} | {median / base[push]:.2f} |",
                    flush=True,
                )


def link_of(text: str) -> tuple[float, float]:
    """ "100:50" -> (100.0 Mbit/s, 50.0 ms one way)."""
    megabits, _, delay = text.partition(":")
    return float(megabits), float(delay)


def main() -> None:
    """Make the model and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--links", type=link_of, nargs="+", default=[(1000.0, 2.5), (100.0, 2.5), (100.0, 50.0)])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        shape = LlamaConfig(
            hidden_size=options.hidden, intermediate_size=3 * options.hidden, num_hidden_layers=2 * HOPS,
            num_attention_heads=8, num_key_value_heads=4, vocab_size=256, max_position_embeddings=2048,
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape).save_pretrained(directory)
        trio.run(measure, Path(directory), options)


if __name__ == "__main__":
    main()
