"""Drafts from the text over slow links: tokens a second with and without, and whether the answers are the same.

    python benchmarks/drafts.py [--round_trips 30 80 150] [--tokens 96]

The default model through three servers, each pair of peers the same distance apart (every connection goes through a
proxy that delays it). Each prompt is answered twice, with `drafts="never"` and `drafts="auto"`; the ratio is that of
decoding speeds, the first token left out.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from contextlib import ExitStack

import trio
from network import HOPS, Link, free_port, proxy
from servers import server

from petals import PeerConfig, Timeouts, open_peer

PROMPTS = {
    "a list that goes on": "".join(f"{number}. Say hello to guest number {number}.\n" for number in range(1, 9)),
    "code, 2,000 characters": "# A module, and then the same module again.\n" + inspect.getsource(textwrap)[:2000],
    "a sentence, six times": "The quick brown fox jumps over the lazy dog. " * 6,
    "a story": "Once upon a time, in a village by the sea, there lived an old woman who",
}
BLOCKS = ("0:10", "10:20", "20:30")


async def measure(options: argparse.Namespace) -> None:
    """Start everything, run, print."""
    link = Link()
    with ExitStack() as servers:
        async with trio.open_nursery() as nursery:
            joining: tuple[str, ...] = ()
            for blocks in BLOCKS[:HOPS]:
                real, shown = free_port(), free_port()
                nursery.start_soon(proxy, link, shown, real)
                words = ("--serve", blocks, "--listen", f"/ip4/127.0.0.1/tcp/{real}",
                         "--announce", f"/ip4/127.0.0.1/tcp/{shown}", *joining)  # fmt: skip
                address = await trio.to_thread.run_sync(servers.enter_context, server(*words, threads=1))
                joining = joining or ("--initial_peers", address)
            await compare(link, joining[1], options)
            nursery.cancel_scope.cancel()


async def compare(link: Link, address: str, options: argparse.Namespace) -> None:
    """Both ways over every link."""
    config = PeerConfig(initial_peers=(address,), timeouts=Timeouts(route_s=60.0))
    async with open_peer(config, progress=lambda _: None) as peer:
        print("| round trip | prompt | tokens/s without | with drafts | ratio | tokens a step | right | same answer |")
        print("|---|---|---|---|---|---|---|---|")
        for round_trip_ms in options.round_trips:
            link.one_way_s = round_trip_ms / 2e3
            for name, prompt in PROMPTS.items():
                speeds, answers = [], []
                for mode in ("never", "auto"):
                    async with await peer.generate(prompt, max_new_tokens=options.tokens, drafts=mode) as stream:
                        async for _ in stream:
                            pass
                    speeds.append(stream.tokens_per_s)
                    answers.append(stream.token_ids)
                drafts = stream.drafts
                right = f"{drafts.accepted / drafts.drafted:.0%}" if drafts.drafted else "none made"
                ratio = speeds[1] / speeds[0]
                print(
                    f"| {round_trip_ms:g} ms | {name} | {speeds[0]:.2f} | {speeds[1]:.2f} | {ratio:.2f} | "
                    f"{len(stream.token_ids) / drafts.steps:.2f} | {right} | {answers[0] == answers[1]} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--round_trips", type=float, nargs="+", default=[30.0, 80.0, 150.0], metavar="MS")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer (default: 96)")
    trio.run(measure, parser.parse_args())


if __name__ == "__main__":
    main()
