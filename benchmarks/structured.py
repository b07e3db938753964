"""What a grammar costs: tokens per second of the default model through two peers, free and constrained, by turns.

    python benchmarks/structured.py [--tokens 96] [--rounds 5]

Both answers are sampled with one seed and have the same number of tokens; drafts are off, since a grammar changes which
guesses are right. Prints the median of each, and the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import trio
from servers import two_servers

from petals import PeerConfig, open_peer
from petals.peer.client.constraints import TokenMask
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.node import Peer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["poet", "painter", "pilot"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 1000}
PROMPT = "A list of people as JSON, with name, age, kind and tags:\n"


class Stopwatch:
    """Seconds that the decoding thread spends on masks: waiting for them, applying them, telling them tokens."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("apply", "advance"):
            setattr(TokenMask, name, self._timed(getattr(TokenMask, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


async def speed(peer: Peer, tokens: int, seed: int, schema: dict[str, object] | None) -> float:
    options = GenerationOptions(
        max_new_tokens=tokens, temperature=0.8, seed=seed, ignore_eos=schema is None, json_schema=schema, drafts="never"
    )
    stream = await peer.generate(PROMPT, options=options)
    async for _ in stream:
        pass
    assert len(stream.token_ids) == tokens, stream.text
    return stream.tokens_per_s


async def measure(addrs: tuple[str, ...], tokens: int, rounds: int) -> None:
    free, bound = [], []
    watch = Stopwatch()
    async with open_peer(PeerConfig(initial_peers=addrs)) as peer:
        await speed(peer, 16, 0, None)
        await speed(peer, 16, 0, SCHEMA)
        watch.seconds = 0.0
        for seed in range(rounds):
            free.append(await speed(peer, tokens, seed, None))
            bound.append(await speed(peer, tokens, seed, SCHEMA))
    ratios = [one / other for one, other in zip(bound, free, strict=True)]
    print("| answer | tokens/s, median | of free, median of neighbours |\n|---|---|---|")
    print(f"| free | {statistics.median(free):.1f} | |")
    print(f"| JSON schema | {statistics.median(bound):.1f} | {statistics.median(ratios):.3f} |")
    per_token = watch.seconds / rounds / tokens
    print(f"masks take {1e6 * per_token:.0f} us of a token's {1e3 / statistics.median(bound):.1f} ms")
    print("ratios:", " ".join(f"{each:.3f}" for each in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with two_servers(30, threads=1) as address:
        trio.run(measure, (address,), options.tokens, options.rounds)


if __name__ == "__main__":
    main()
