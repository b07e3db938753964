"""`petals peer`: one peer, roles chosen by flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals.protocols.errors import UserError

if TYPE_CHECKING:
    from petals.peer.client.generation import GenerationOptions, TokenStream
    from petals.peer.client.model_client import ClientOptions
    from petals.peer.client.routing import RouteChoice, RouteHop
    from petals.peer.config import NatConfig
    from petals.peer.node import Peer

EXAMPLES = """
examples:
  petals peer --serve 0:15 --new_swarm                    hold the first half of the default model
  petals peer --serve 15:30 --initial_peers ADDR          hold the other half; ADDR is what the first peer printed
  petals peer --generate "A cat sat on" --initial_peers ADDR
  petals peer --serve 0:30 --generate "A cat sat on"      everything in one process
  petals peer --http --initial_peers ADDR                 a chat page and OpenAI's API on http://127.0.0.1:8000
  petals peer --chat --initial_peers ADDR                 talk to the model
  petals peer --bootstrap --listen /ip4/0.0.0.0/tcp/31337 only keep the directory (starts without torch)
"""


def block_range(text: str) -> range:
    """ "0:12" -> range(0, 12)"""
    start, colon, end = text.partition(":")
    if colon and start.isdigit() and end.isdigit() and int(start) < int(end):
        return range(int(start), int(end))
    raise argparse.ArgumentTypeError(
        f"{text!r} is no block range; write START:END, half-open, like 0:12 (and MODEL in front of the flags)"
    )


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "peer",
        help="run a peer: serve blocks, generate text, or both",
        description="Run one peer. --serve holds blocks and answers others; --generate asks the swarm.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `petals peer`, which the aliases share."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="hub name, local directory or .gguf file (default: SmolLM2-135M-Instruct, fetched on first use)",
    )
    roles = parser.add_argument_group("roles, any combination")
    roles.add_argument("--serve", metavar="A:B", type=block_range, nargs="?", const=range(0),
                       help="hold blocks A to B (half-open), answer others; without A:B as many as fit into memory, "
                       "where the swarm is weakest, and others when that changes")  # fmt: skip
    roles.add_argument("--num_blocks", metavar="N", type=int, help="hold N blocks where the swarm is weakest")
    roles.add_argument("--generate", metavar="PROMPT", help="ask the swarm to go on with PROMPT")
    roles.add_argument("--http", metavar="HOST:PORT", nargs="?", const="127.0.0.1:8000",
                       help="chat page and OpenAI-compatible API (default: 127.0.0.1:8000)")  # fmt: skip
    roles.add_argument("--chat", action="store_true", help="talk to the model in this terminal; /help says how")
    roles.add_argument("--bootstrap", action="store_true", help="only keep the directory of the swarm")

    network = parser.add_argument_group("network")
    network.add_argument("--initial_peers", metavar="ADDR", nargs="+", default=[], help="peers of the swarm to join")
    network.add_argument("--new_swarm", action="store_true", help="say that this peer starts a swarm of its own")
    network.add_argument(
        "--listen", metavar="ADDR", nargs="+", default=None, help="multiaddrs (default: /ip4/127.0.0.1/tcp/0)"
    )
    network.add_argument(
        "--announce", metavar="ADDR", nargs="+", default=[], help="tell others these instead (a forwarded port)"
    )
    network.add_argument("--relay", action="store_true",
                         help="hand on calls to peers behind routers; for peers that others can dial")  # fmt: skip
    network.add_argument("--relay_mb_s", metavar="MB", type=float, default=0.0,
                         help="of --relay: megabytes per second, all calls together (default: no limit)")  # fmt: skip
    network.add_argument("--relays", metavar="ADDR", nargs="+", default=[],
                         help="behind a router, be reached through these (default: some the swarm knows)")  # fmt: skip
    network.add_argument("--no_upnp", action="store_true", help="do not ask the router for a port")
    network.add_argument(
        "--identity", metavar="FILE", type=Path, help="key file, made on first use (default: a new key)"
    )
    network.add_argument(
        "--transport", choices=("petals", "stock"), default="petals", help="stock: py-libp2p's own, for comparison"
    )

    asking = parser.add_argument_group("asking")
    asking.add_argument("--system", metavar="TEXT", help="tell the model of a --chat first who it is")
    asking.add_argument("--max_new_tokens", metavar="N", type=int,
                        help="how many tokens (default: 64; 512 for each answer of a --chat)")  # fmt: skip
    asking.add_argument("--temperature", type=float, help="sample at this temperature instead of taking the likeliest")
    asking.add_argument("--top_k", type=int, help="sample among the K likeliest tokens")
    asking.add_argument("--top_p", type=float, help="sample among the likeliest tokens that make up this probability")
    asking.add_argument("--seed", type=int, help="makes sampling repeatable")
    asking.add_argument("--active_adapter", metavar="NAME", help="a LoRA adapter that servers host")
    asking.add_argument("--compression", choices=("none", "float16", "int8"), default="none",
                        help="how hidden states travel, asked and answered; none is exact")  # fmt: skip
    asking.add_argument("--trace", metavar="FILE", type=Path,
                        help="of --generate or --chat: where each step's time went, for ui.perfetto.dev")  # fmt: skip
    asking.add_argument("--show_route", action="store_true",
                        help="say what each server is expected to take, and why others are not used")  # fmt: skip
    asking.add_argument("--route_timeout", metavar="S", type=float, default=20.0,
                        help="how long to look for peers that hold missing blocks (default: 20 s)")  # fmt: skip

    door = parser.add_argument_group("with --http")
    door.add_argument("--api_keys", metavar="FILE", type=Path, help="ask for a key; `petals keygen --api` makes one")
    door.add_argument("--cors", metavar="ORIGIN", nargs="+", default=[], help="web pages that may ask from a browser")
    door.add_argument("--http_models", metavar="MODEL", nargs="+", default=[], help="offer these models, too")

    serving = parser.add_argument_group("serving")
    serving.add_argument("--dtype", "--torch_dtype", default="auto", help="auto, float32, bfloat16 or float16")
    serving.add_argument("--device", default="auto", help="auto, cpu, cuda:0")
    serving.add_argument("--quant_type", choices=("none", "int8", "nf4"), default="none", help="quantise the blocks")
    serving.add_argument("--adapters", metavar="DIR", nargs="+", type=Path, default=[], help="LoRA adapters to host")
    serving.add_argument("--cache_mb", metavar="MB", type=float, default=1024, help="KV-cache budget (default: 1024)")
    serving.add_argument("--throughput", metavar="RPS", type=float, help="announce this instead of measuring")
    serving.add_argument("--balance_quality", metavar="Q", type=float, default=0.95,
                         help="where the choice is ours, move when the swarm's strain would fall below this share of "
                         "what it is; 0: never (default: 0.95)")  # fmt: skip
    serving.add_argument("--mean_balance_check_period", metavar="S", type=float,
                         default=120.0, help="how often to look whether moving pays (default: 120 s)")  # fmt: skip
    serving.add_argument("--deterministic", action="store_true",
                         help="compute everybody's steps alone, so that answers are the same to the last bit whoever "
                         "else asks; many users at once then wait for one another")  # fmt: skip
    serving.add_argument("--prefix_idle", metavar="S", type=float, default=600.0,
                         help="how long the cache of an ended session is kept for the next one that begins with the "
                         "same tokens, where nobody needs the room; 0: not at all (default: 600 s)")  # fmt: skip
    serving.add_argument("--share_prefixes", action="store_true",
                         help="let every client begin with what any client left: they trust each other")  # fmt: skip
    serving.add_argument("--favour", metavar="PEER_ID", nargs="+", default=[],
                         help="peers whose work goes before others' of the same kind, such as your own")  # fmt: skip
    serving.add_argument("--priority", choices=("fair", "reciprocal"), default="fair",
                         help="when it is crowded: fair gives every peer the same share, reciprocal a larger one to "
                         "those who served this peer, a little to those who served them (default: fair)")  # fmt: skip
    serving.add_argument("--public_name", default="", help="shown to others")
    serving.add_argument("--revision", help="of a hub model")
    serving.add_argument("--token", help="for private hub models")

    parser.add_argument("--json", action="store_true", help="results as JSON on stdout")
    parser.add_argument("--verbose", "-v", action="store_true", help="logs of what happens, on stderr")
    parser.set_defaults(run=run, synchronous=False)


def nat_config(options: argparse.Namespace) -> NatConfig:
    """What the flags say about routers."""
    from petals.peer.config import NatConfig, RelayLimits

    relay = RelayLimits(bytes_per_s=1e6 * options.relay_mb_s) if options.relay else None
    return NatConfig(relays=tuple(options.relays), relay=relay, upnp=not options.no_upnp)


async def run(options: argparse.Namespace) -> None:
    """Run the peer that the flags describe."""
    _check(options)
    if options.bootstrap:
        from petals.cli.run_dht import keep_directory

        await keep_directory(options)
        return
    started = time.perf_counter()
    _say("starting (torch takes a few seconds to import)")
    from petals.peer.config import PeerConfig, ServeConfig, Timeouts
    from petals.peer.node import open_peer

    serve = None
    if options.serve is not None or options.num_blocks is not None:
        serve = ServeConfig(
            blocks=options.serve or None,
            num_blocks=options.num_blocks,
            adapters=tuple(options.adapters),
            cache_bytes=int(options.cache_mb * 1e6),
            dtype=options.dtype,
            quant_type=options.quant_type,
            device=options.device,
            public_name=options.public_name,
            throughput=options.throughput,
            favoured=frozenset(options.favour),
            priority=options.priority,
            deterministic=options.deterministic,
            prefix_idle_s=options.prefix_idle,
            share_prefixes=options.share_prefixes,
            compression=options.compression,
            balance_quality=options.balance_quality,
            mean_balance_check_period=options.mean_balance_check_period,
        )
    config = PeerConfig(
        model=options.model,
        revision=options.revision,
        token=options.token,
        serve=serve,
        identity=options.identity,
        listen=tuple(options.listen or PeerConfig().listen),
        announce=tuple(options.announce),
        initial_peers=tuple(options.initial_peers),
        nat=nat_config(options),
        transport=options.transport,
        timeouts=Timeouts(route_s=options.route_timeout),
    )
    async with open_peer(config, progress=_say) as peer:
        if peer.server is not None:
            _print_server(peer, as_json=options.json and options.generate is None)
        if options.chat:
            from petals.cli.chat import chat

            with _tracing(options) as client:
                await chat(peer, _wanted(options, 512), client, system=options.system)
        elif options.generate is not None:
            await _generate(peer, options, time.perf_counter() - started)
        elif options.http is not None:
            await _keep_door(peer, options)
        else:
            import trio

            await trio.sleep_forever()


def _check(options: argparse.Namespace) -> None:
    if options.new_swarm and options.initial_peers:
        raise UserError("--new_swarm starts a swarm and --initial_peers joins one: give one of them")
    serves = options.serve is not None or options.num_blocks is not None
    if options.serve and options.num_blocks is not None:
        raise UserError("--serve says which blocks, --num_blocks lets the peer choose: give one of them")
    if options.trace is not None and not options.chat and options.generate is None:
        raise UserError("--trace is about what --generate or --chat asks: give one of them, too")
    if options.http is None and (options.api_keys or options.cors or options.http_models):
        raise UserError("--api_keys, --cors and --http_models are about --http: give it, too")
    if options.bootstrap:
        if serves or options.chat or options.generate is not None or options.http is not None:
            raise UserError("--bootstrap only keeps the directory: leave it out to serve, ask, chat or open a door")
        return
    if options.chat and (options.json or options.generate is not None or options.http is not None):
        raise UserError("--chat is for people and asks for its own prompts: leave --json, --generate and --http out")
    if options.system is not None and not options.chat:
        raise UserError("--system is for --chat")
    if options.http is not None and options.generate is not None:
        raise UserError("--generate asks once and ends, --http stays open: give one of them")
    asks = options.chat or options.generate is not None or options.http is not None
    if not serves and not asks:
        raise UserError('nothing to do: give --serve A:B to hold blocks, --generate "...", --chat or --http to ask')
    if not serves and not options.initial_peers:
        raise UserError("nobody to ask: give --initial_peers ADDR, or hold the blocks here with --serve")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UserError("--max_new_tokens must be at least 1")


async def _keep_door(peer: Peer, options: argparse.Namespace) -> None:
    import trio

    from petals.gateway.config import HttpConfig
    from petals.gateway.serve import open_gateway

    config = HttpConfig(
        bind=options.http, api_keys=options.api_keys, cors=tuple(options.cors), models=tuple(options.http_models)
    )
    if not config.is_loopback and config.api_keys is None:
        _say(f"whoever reaches {config.bind} may ask here; --api_keys FILE lets only those in who have a key")
    async with open_gateway(peer, config) as url:
        if options.json:
            print(json.dumps({"http": url}), flush=True)
        _say(f"open {url} in a browser; OpenAI's clients take base_url={url}/v1")
        await trio.sleep_forever()


def _wanted(options: argparse.Namespace, max_new_tokens: int) -> GenerationOptions:
    from petals.peer.client.generation import GenerationOptions

    return GenerationOptions(
        max_new_tokens=options.max_new_tokens or max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )


@contextmanager
def _tracing(options: argparse.Namespace) -> Iterator[ClientOptions]:
    """What is wanted of the swarm; steps are traced while the context is open, where that is wanted too."""
    from petals.peer.client.model_client import ClientOptions
    from petals.peer.client.tracing import TraceFile

    with nullcontext() if options.trace is None else TraceFile(options.trace, _say) as trace:
        yield ClientOptions(
            compression=options.compression,
            active_adapter=options.active_adapter,
            show_route=options.show_route,
            on_step=None if trace is None else trace.note,
        )


async def _generate(peer: Peer, options: argparse.Namespace, start_s: float) -> None:
    with _tracing(options) as client:
        stream = await peer.generate(options.generate, options=_wanted(options, 64), client=client)
        if not options.json:
            print(options.generate, end="", flush=True)
        async with stream:
            async for token in stream:
                if not options.json:
                    print(token.text, end="", flush=True)
        if options.json:
            print(json.dumps(_as_json(stream, options.generate, start_s)), flush=True)
        else:
            print(flush=True)
            _say(summary(stream))


def summary(stream: TokenStream) -> str:
    """One line: who answered, and how fast."""
    legs = " => ".join(
        f"{hop.blocks.start}:{hop.blocks.stop} via …{hop.peer_id[-6:]} ({hop.round_trip_s * 1e3:.1f} ms)"
        for hop in stream.route
    )
    return f"route {legs}; {len(stream.token_ids)} tokens, {stream.tokens_per_s:.1f} tokens/s"


def _as_json(stream: TokenStream, prompt: str, start_s: float) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": stream.text,
        "token_ids": stream.token_ids,
        "prompt_token_ids": stream.prompt_ids,
        "reused_tokens": stream.reused_tokens,
        "route": [
            {
                "peer_id": hop.peer_id,
                "blocks": [hop.blocks.start, hop.blocks.stop],
                "round_trip_s": hop.round_trip_s,
                "queue_s": hop.queue_s,
                "compute_s": hop.compute_s,
            }
            for hop in stream.route
        ],
        **_choice_as_json(stream.choice),
        "seconds": {"start": start_s, **dataclasses.asdict(stream.seconds)},
        "tokens_per_s": stream.tokens_per_s,
    }


def _choice_as_json(choice: RouteChoice | None) -> dict[str, Any]:
    """What was expected of the route when the session was opened, and why others were not used."""
    if choice is None:
        return {}
    return {
        "expected_route": [_hop_as_json(hop) for hop in choice.route.hops],
        "skipped": [{**_hop_as_json(each.hop), "reason": each.reason} for each in choice.skipped],
    }


def _hop_as_json(hop: RouteHop) -> dict[str, Any]:
    return {
        "peer_id": hop.peer_id,
        "blocks": [hop.blocks.start, hop.blocks.stop],
        "network_s": hop.network_s,
        "queue_s": hop.queue_s,
        "compute_s": hop.compute_s,
    }


def _print_server(peer: Peer, *, as_json: bool) -> None:
    assert peer.server is not None
    blocks, model = peer.server.span.blocks, peer.server.model
    if as_json:
        described = {"model": model.name, "digest": model.digest, "blocks": [blocks.start, blocks.stop]}
        print(json.dumps({"peer_id": peer.peer_id, "addrs": list(peer.addrs), **described}), flush=True)
        return
    _say(f"ready: blocks {blocks.start}:{blocks.stop} of {model.name}. Other peers join with")
    for addr in peer.addrs:
        print(f"--initial_peers {addr}", file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(f"petals: {line}", file=sys.stderr, flush=True)
