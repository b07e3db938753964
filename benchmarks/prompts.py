"""Seconds to the first token of a long prompt: told whole, in pieces that flow, and with a beginning that is kept.

    python benchmarks/prompts.py [--tokens 1024] [--servers 2] [--rounds 3] [--threads 1]

Servers are processes with one thread each, so that they can work side by side on two cores. The reference is the same
prompt told hop by hop. "Second question": a prompt of which the servers have kept all but the last 64 tokens.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from itertools import pairwise

import torch
from servers import server, table, take_turns

from petals import connect
from petals.peer.client.model_client import ModelClient, Prefix
from petals.peer.client.session.pipelined_step import PIECE_TOKENS
from petals.protocols.prefixes import prefix_names


async def first_token(client: ModelClient, hidden: torch.Tensor, piece_tokens: int, ids: list[int]) -> None:
    """Open a session, tell the prompt; `ids`: begin with what is kept of them, and leave it again."""
    names = tuple(prefix_names(ids[:-1]))
    tokens = hidden.shape[1]
    prefix = Prefix(names, lambda: hidden) if names else None
    session = await client.open_session(client.blocks, 1, tokens + 32, prefix=prefix)
    session._piece_tokens = piece_tokens
    await session.step(hidden[:, session.position :])
    await session.close(prefix_names(ids[: tokens - 64]))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    blocks, count = 30, options.servers
    bounds = [blocks * index // count for index in range(count + 1)]
    with ExitStack() as stack:
        address: list[str] = []
        for start, stop in pairwise(bounds):
            words = ["--serve", f"{start}:{stop}", *(["--initial_peers", *address] if address else [])]
            found = stack.enter_context(server(*words, threads=options.threads))
            address = address or [found]
        peer = stack.enter_context(connect(*address)).peer

        async def ready() -> ModelClient:
            client = await peer.client()
            await client.ready()
            return client

        run = peer.portal.run
        client = run(ready)
        hidden = torch.randn(1, options.tokens, client.checkpoint.hidden_size)
        ids = list(range(options.tokens))
        contestants = {
            "hop by hop": partial(run, first_token, client, hidden, 0, []),
            f"in pieces of {PIECE_TOKENS}": partial(run, first_token, client, hidden, PIECE_TOKENS, []),
            "in pieces of 256": partial(run, first_token, client, hidden, 256, []),
            "second question": partial(run, first_token, client, hidden, PIECE_TOKENS, ids),
        }
        seconds = take_turns(contestants, options.rounds)
    print(f"{options.tokens} tokens, {count} servers of {options.threads} threads, torch {torch.__version__}\n")
    print(table("prompt", seconds, options.tokens, "tokens/s"))


if __name__ == "__main__":
    main()
