"""`petals peer`: one peer, roles chosen by flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petals.cli.base.addresses import check_addresses
from petals.cli.base.argument_types import SEEDS, at_least_1, number, positive, whole
from petals.cli.base.file_arguments import read_argument, token_of
from petals.cli.base.help_format import Formatter
from petals.cli.base.terminal import hush
from petals.cli.base.terminal import say as _say
from petals.cli.conversation import on_terminal
from petals.cli.imports import importing
from petals.cli.status.render import legs
from petals.models.progress import counting_seconds
from petals.protocols.errors import MissingBlocks, UserError, describe_blocks
from petals.protocols.types import PeerId

if TYPE_CHECKING:
    from petals.gateway.server import Door
    from petals.peer.base.config import LanConfig, NatConfig, PeerConfig
    from petals.peer.client.generation.generation import TokenStream
    from petals.peer.client.generation.generation_options import GenerationOptions
    from petals.peer.client.model_client import ClientOptions
    from petals.peer.node import Peer

EVERYWHERE = "/ip4/0.0.0.0/tcp/0"
LOOK_S = 10.0
"""How long a door looks for all blocks before it says that some are missing."""

EXAMPLES = """
examples:
  petals peer --serve 0:15 --new_swarm                    hold the first half of the default model
  petals peer --serve 15:30 --initial_peers ADDR          hold the other half; ADDR is what the first peer printed
  petals peer --generate "A cat sat on" --initial_peers ADDR
  petals peer --serve 0:30 --generate "A cat sat on"      everything in one process
  petals peer --http --initial_peers ADDR                 a chat page and OpenAI's API on http://127.0.0.1:8000
  petals peer --chat --initial_peers ADDR                 talk to the model
  petals peer swarm:DIGEST --serve --initial_peers ADDR   fetch the blocks from those who hold them; no hub is needed
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


def peer_ids(words: Sequence[str]) -> frozenset[PeerId]:
    """Peer IDs as they are written; @FILE stands for those in a file, one per line, # and what follows aside."""
    from petals.peer.base.identity import parse_peer_id

    found: set[PeerId] = set()
    for word in words:
        lines = read_argument(word[1:]).splitlines() if word.startswith("@") else [word]
        found.update(parse_peer_id(text) for line in lines if (text := line.partition("#")[0].strip()))
    return frozenset(found)


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "peer",
        help="run a peer: serve blocks, generate text, or both",
        description="Run one peer. --serve holds blocks and answers others; --generate, --chat and --http ask the "
        "swarm.",
        epilog=EXAMPLES,
        usage="petals peer [MODEL] [--serve [A:B]] [--generate PROMPT | --chat | --http] [more flags]",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `petals peer`, which the aliases share."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="hub name, local directory, .gguf file, or swarm:DIGEST for what others serve (default: "
        "SmolLM2-135M-Instruct, fetched on first use)",
    )
    roles = parser.add_argument_group("roles, any combination")
    roles.add_argument("--serve", metavar="A:B", type=block_range, nargs="?", const=range(0),
                       help="hold blocks A to B (half-open), answer others; without A:B as many as fit into memory, "
                       "where the swarm is weakest, and others when that changes")  # fmt: skip
    roles.add_argument("--num_blocks", metavar="N", type=at_least_1, help="hold N blocks where the swarm is weakest")
    roles.add_argument("--generate", metavar="PROMPT", help="ask the swarm to go on with PROMPT")
    roles.add_argument("--http", metavar="HOST:PORT", nargs="?", const="127.0.0.1:8000",
                       help="chat page and OpenAI-compatible API (default: 127.0.0.1:8000)")  # fmt: skip
    roles.add_argument("--chat", action="store_true", help="talk to the model in this terminal; /help says how")
    roles.add_argument("--bootstrap", action="store_true", help="only keep the directory of the swarm")

    network = parser.add_argument_group("network")
    network.add_argument("--initial_peers", metavar="ADDR", nargs="+", default=[], help="peers of the swarm to join")
    network.add_argument(
        "--new_swarm",
        action="store_true",
        help="start a swarm of its own: join nobody, and do not be found on the local network",
    )
    network.add_argument(
        "--listen",
        metavar="ADDR",
        nargs="+",
        default=[EVERYWHERE],
        help=f"multiaddrs to listen on (default: {EVERYWHERE}, all addresses and a free port)",
    )
    network.add_argument(
        "--announce", metavar="ADDR", nargs="+", default=[], help="tell others these instead (a forwarded port)"
    )
    network.add_argument("--relay", action="store_true",
                         help="hand on calls to peers behind routers; for peers that others can dial")  # fmt: skip
    network.add_argument("--relay_mb_s", metavar="MB", type=number(), default=0.0,
                         help="of --relay: megabytes per second, all calls together (default: no limit)")  # fmt: skip
    network.add_argument("--relays", metavar="ADDR", nargs="+", default=[],
                         help="behind a router, be reached through these (default: some the swarm knows)")  # fmt: skip
    network.add_argument("--swarm", metavar="NAME", default="",
                         help="on the local network, join only peers that were given the same name")  # fmt: skip
    network.add_argument("--no_mdns", action="store_true", help="do not look for peers on the local network")
    network.add_argument("--no_upnp", action="store_true", help="do not ask the router for a port")
    network.add_argument(
        "--identity", metavar="FILE", type=Path, help="key file, made on first use (default: a new key)"
    )
    network.add_argument("--invitation", metavar="TOKEN",
                         help="join by what `petals invite` printed, or what is in @FILE")  # fmt: skip
    network.add_argument("--block", metavar="PEER_ID", nargs="+", default=[],
                         help="close the connections of these peers; @FILE: those listed there")  # fmt: skip
    network.add_argument("--swarm_key", metavar="FILE", type=Path,
                         help="key of a private swarm: only peers with the same one can connect; "
                         "`petals keygen --swarm FILE` makes one")  # fmt: skip
    network.add_argument("--weights_from", choices=("auto", "hub", "swarm"), default="auto",
                         help="auto: from the hub or the disk, and from the swarm's servers where the hub can not be "
                         "reached; swarm: from them alone; hub: never from them (default: auto)")  # fmt: skip
    network.add_argument(
        "--transport", choices=("petals", "stock"), default="petals", help="stock: py-libp2p's own, for comparison"
    )

    asking = parser.add_argument_group("asking")
    asking.add_argument("--system", metavar="TEXT", help="tell the model of a --chat first who it is")
    asking.add_argument("--max_new_tokens", metavar="N", type=at_least_1,
                        help="how many tokens (default: 64; 512 for each answer of a --chat)")  # fmt: skip
    asking.add_argument("--temperature", metavar="T", type=number(),
                        help="sample at this temperature; 0, or none of these four: take the likeliest")  # fmt: skip
    asking.add_argument("--top_k", metavar="K", type=whole(0), help="sample among the K likeliest tokens; 0: among all")
    asking.add_argument("--top_p", metavar="P", type=number(0, 1, above=True),
                        help="sample among the likeliest tokens that make up this probability")  # fmt: skip
    asking.add_argument("--seed", metavar="N", type=whole(*SEEDS), help="makes sampling repeatable")
    asking.add_argument("--drafts", choices=["auto", "always", "never"], default="auto",
                        help="guess tokens from the text and check several in one step; the answer stays the same "
                        "(default: auto, where measured steps say that it pays)")  # fmt: skip
    asking.add_argument("--json_schema", metavar="FILE", type=Path,
                        help="of --generate: the answer is JSON that the schema in this file accepts")  # fmt: skip
    asking.add_argument("--active_adapter", metavar="NAME", help="a LoRA adapter that servers host")
    asking.add_argument("--local_blocks", metavar="A:B", type=block_range, nargs="+", default=[],
                        help="compute these blocks here and never ask others for them, such as 0:2 28:30: with the "
                        "first and last ones at home, nobody sees the states next to words")  # fmt: skip
    asking.add_argument("--audit", metavar="P", type=number(0, 1), default=0.0,
                        help="let another server compute an answer again with this probability, such as 0.05, beside "
                        "the generation; who answers wrongly is not asked again (default: 0)")  # fmt: skip
    asking.add_argument("--audit_at_home", action="store_true",
                        help="of --audit: load a server's blocks here to decide, where two servers disagree or nobody "
                        "else holds them")  # fmt: skip
    asking.add_argument("--compression", choices=("none", "float16", "int8"), default="none",
                        help="how hidden states travel, asked and answered; none is exact")  # fmt: skip
    asking.add_argument("--head_quant", choices=("none", "int8"), default="none",
                        help="hold the head here in int8: faster on a CPU, but it rounds logits; none is "
                        "exact")  # fmt: skip
    asking.add_argument("--trace", metavar="FILE", type=Path,
                        help="of --generate or --chat: where each step's time went, for ui.perfetto.dev")  # fmt: skip
    asking.add_argument("--show_route", action="store_true",
                        help="say what each server is expected to take, and why others are not used")  # fmt: skip
    asking.add_argument("--route_timeout", metavar="S", type=positive, default=20.0,
                        help="how long to look for peers that hold missing blocks (default: 20 s)")  # fmt: skip

    door = parser.add_argument_group("with --http")
    door.add_argument("--api_keys", metavar="FILE", type=Path, help="ask for a key; `petals keygen --api` makes one")
    door.add_argument("--cors", metavar="ORIGIN", nargs="+", default=[], help="web pages that may ask from a browser")
    door.add_argument("--http_hosts", metavar="NAME", nargs="+", default=[],
                      help="without keys: answer to these names, too (*: to all), not only to addresses, localhost "
                      "and this machine's name")  # fmt: skip
    door.add_argument("--http_models", metavar="MODEL", nargs="+", default=[], help="offer these models, too")

    serving = parser.add_argument_group("serving")
    serving.add_argument("--dtype", "--torch_dtype", metavar="DTYPE", default="auto",
                         choices=("auto", "float32", "bfloat16", "float16"),
                         help="compute in float32, bfloat16 or float16 (default: auto: float32 on a CPU, else the "
                         "model's own)")  # fmt: skip
    serving.add_argument("--device", default="auto",
                         help="cpu, cuda, cuda:1, ... (default: auto: cuda where there is one)")  # fmt: skip
    serving.add_argument("--quant_type", choices=("none", "int8", "nf4"), default="none", help="quantise the blocks")
    serving.add_argument("--adapters", metavar="DIR", nargs="+", type=Path, default=[], help="LoRA adapters to host")
    serving.add_argument(
        "--cache_mb", metavar="MB", type=positive, default=1024, help="KV-cache budget (default: 1024)"
    )
    serving.add_argument("--work_mb", metavar="MB", type=positive,
                         help="memory for requests under way, besides the cache; one peer may hold half of it "
                         "(default: a quarter of the machine's memory, at least 1024)")  # fmt: skip
    serving.add_argument("--throughput", metavar="RPS", type=positive,
                         help="announce this many blocks per second instead of measuring")  # fmt: skip
    serving.add_argument("--balance_quality", metavar="Q", type=number(0, 1), default=0.95,
                         help="where the choice is ours, move when the swarm's strain would fall below this share of "
                         "what it is; 0: never (default: 0.95)")  # fmt: skip
    serving.add_argument("--mean_balance_check_period", metavar="S", type=positive,
                         default=120.0, help="how often to look whether moving pays (default: 120 s)")  # fmt: skip
    serving.add_argument("--deterministic", action="store_true",
                         help="compute everybody's steps alone, so that answers are the same to the last bit whoever "
                         "else asks; many users at once then wait for one another")  # fmt: skip
    serving.add_argument("--prefix_idle", metavar="S", type=number(), default=600.0,
                         help="how long the cache of an ended session is kept for the next one that begins with the "
                         "same tokens, where nobody needs the room; 0: not at all (default: 600 s)")  # fmt: skip
    serving.add_argument("--share_prefixes", action="store_true",
                         help="let every client begin with what any client left: they trust each other")  # fmt: skip
    serving.add_argument("--favour", metavar="PEER_ID", nargs="+", default=[],
                         help="peers whose work goes before others' of the same kind, such as your own, and who are "
                         "free of the rates below; @FILE: those listed there")  # fmt: skip
    serving.add_argument("--allow", metavar="PEER_ID", nargs="+",
                         help="only these peers may use the blocks; @FILE: those listed there")  # fmt: skip
    serving.add_argument("--invited_by", metavar="PEER_ID", nargs="*",
                         help="only bearers of these peers' invitations, or of this server's own, may use the blocks "
                         "(and whom --allow names)")  # fmt: skip
    serving.add_argument("--max_peer_sessions", metavar="N", type=at_least_1, default=128,
                         help="sessions and requests of one peer at a time (default: 128)")  # fmt: skip
    serving.add_argument("--max_peer_share", metavar="S", type=number(0, 1, above=True), default=1.0,
                         help="the most of the KV-cache one peer may hold, 0 to 1 (default: 1, all)")  # fmt: skip
    serving.add_argument("--max_peer_tokens_s", metavar="N", type=positive,
                         help="tokens per second of one peer; more wait their turn (default: no limit)")  # fmt: skip
    serving.add_argument("--max_peer_bytes_s", metavar="N", type=positive,
                         help="bytes of tensors per second, in and out, of one peer (default: no limit)")  # fmt: skip
    serving.add_argument("--share_weights", action="store_true", default=None,
                         help="let newcomers fetch the model from us, whatever its licence says (default: if that is "
                         "known to let anybody pass it on)")  # fmt: skip
    serving.add_argument("--no_share_weights", dest="share_weights", action="store_false",
                         help="let nobody fetch it from us")  # fmt: skip
    serving.add_argument("--max_share_mb_s", metavar="MB", type=positive, default=20.0,
                         help="give newcomers at most this much a second, all together (default: 20)")  # fmt: skip
    serving.add_argument("--priority", choices=("fair", "reciprocal"), default="fair",
                         help="when it is crowded: fair gives every peer the same share, reciprocal a larger one to "
                         "those who served this peer, a little to those who served them (default: fair)")  # fmt: skip
    serving.add_argument("--public_name", metavar="NAME", default="", help="shown to others")
    serving.add_argument("--revision", help="of a hub model")
    serving.add_argument("--token", help="for private hub models; @FILE: what is in it")

    parser.add_argument("--dry_run", action="store_true",
                        help="only say which blocks would be held, in how much memory and why, and who would be asked; "
                        "no weights are read")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="results as JSON on stdout")
    parser.add_argument("--verbose", "-v", action="store_true", help="logs of what happens, on stderr")
    parser.set_defaults(run=run, synchronous=False, lasts=_lasts, serve_settings={})


def _lasts(options: argparse.Namespace) -> bool:
    """Whether the peer stays until it is stopped."""
    return options.generate is None and not options.dry_run


def nat_config(options: argparse.Namespace) -> NatConfig:
    """What the flags say about routers."""
    from petals.peer.base.config import NatConfig, RelayLimits

    relay = RelayLimits(bytes_per_s=1e6 * options.relay_mb_s) if options.relay else None
    return NatConfig(relays=tuple(options.relays), relay=relay, upnp=not options.no_upnp)


def lan_config(options: argparse.Namespace) -> LanConfig | None:
    """What the flags say about the local network. A peer that listens on this machine only leaves it alone."""
    from petals.peer.base.config import LanConfig

    if options.no_mdns or options.new_swarm or options.transport == "stock" or _stays_here(options):
        return None
    serves = options.bootstrap or options.serve is not None or options.num_blocks is not None
    joins = bool(options.initial_peers) or options.invitation is not None
    # Who was told where to go, or what to hold, need not wait for others to decide.
    knows = joins or options.bootstrap or bool(options.serve)
    return LanConfig(
        swarm=options.swarm,
        search_s=0.0 if knows else LanConfig().search_s,
        required=not serves and not joins,
    )


def _stays_here(options: argparse.Namespace) -> bool:
    return all(addr.startswith(("/ip4/127.", "/ip6/::1/")) for addr in options.listen)


async def run(options: argparse.Namespace) -> None:
    """Run the peer that the flags describe."""
    _check(options)
    if options.bootstrap:
        from petals.cli.run_dht import keep_directory

        await keep_directory(options)
        return
    import trio

    asked = _Asked(options.generate, as_json=options.json)
    try:
        await _run_peer(options, asked)
    except trio.Cancelled:
        if options.generate is not None and not options.dry_run:
            asked.cut_off()
        raise


async def _run_peer(options: argparse.Namespace, asked: _Asked) -> None:
    started = time.perf_counter()
    _say("starting (torch takes a few seconds to import)")
    with importing():
        from petals.models.source.library import import_models

        import_models()
        from petals.peer.base.config import PeerConfig, ServeConfig, Timeouts, quarter_of_memory
        from petals.peer.node import open_peer

    serve = None
    if options.serve is not None or options.num_blocks is not None:
        serve = ServeConfig(
            blocks=options.serve or None,
            num_blocks=options.num_blocks,
            adapters=tuple(options.adapters),
            cache_bytes=int(options.cache_mb * 1e6),
            work_bytes=quarter_of_memory() if options.work_mb is None else int(options.work_mb * 1e6),
            dtype=options.dtype,
            quant_type=options.quant_type,
            device=options.device,
            public_name=options.public_name,
            throughput=options.throughput,
            favoured=peer_ids(options.favour),
            allowed=None if options.allow is None else peer_ids(options.allow),
            invited_by=None if options.invited_by is None else peer_ids(options.invited_by),
            max_sessions_per_peer=options.max_peer_sessions,
            max_peer_share=options.max_peer_share,
            max_peer_tokens_s=options.max_peer_tokens_s,
            max_peer_bytes_s=options.max_peer_bytes_s,
            priority=options.priority,
            deterministic=options.deterministic,
            prefix_idle_s=options.prefix_idle,
            share_prefixes=options.share_prefixes,
            compression=options.compression,
            balance_quality=options.balance_quality,
            mean_balance_check_period=options.mean_balance_check_period,
            share_weights=options.share_weights,
            max_share_bytes_s=options.max_share_mb_s * 1e6,
            **options.serve_settings,
        )
    config = PeerConfig(
        model=options.model,
        weights_from=options.weights_from,
        revision=options.revision,
        token=token_of(options.token),
        serve=serve,
        identity=options.identity,
        listen=tuple(options.listen),
        announce=tuple(options.announce),
        initial_peers=tuple(options.initial_peers),
        # Whoever stays open waits as long as it takes; whoever asked one question wants to know now.
        wait_for_initial_peers=options.generate is None and not options.chat and not options.dry_run,
        nat=nat_config(options),
        lan=lan_config(options),
        swarm_key=options.swarm_key,
        invitation=token_of(options.invitation),
        blocked=peer_ids(options.block),
        transport=options.transport,
        timeouts=Timeouts(route_s=options.route_timeout),
    )
    check_addresses("--announce", options.announce, named=False)
    check_addresses("--relays", options.relays, named=True)
    if serve is not None:
        from petals.peer.server.device import device_of

        device_of(serve)
    if options.dry_run:
        await _dry_run(options, config)
        return
    # What can be wrong is opened before blocks are loaded for it.
    with ExitStack() as opened:
        client = opened.enter_context(_tracing(options))
        door = None if options.http is None else opened.enter_context(_door(options))
        async with open_peer(config, progress=_say) as peer:
            if peer.server is not None:
                _print_server(peer, as_json=options.json and options.generate is None)
            if options.chat:
                from petals.cli.chat import chat

                await chat(peer, _wanted(options, 512), client, system=options.system)
            elif options.generate is not None:
                asked.start_s = time.perf_counter() - started
                await _generate(peer, options, client, asked)
            elif door is not None:
                peer.asking = client
                await _keep_door(peer, door, as_json=options.json)
            else:
                import trio

                await trio.sleep_forever()


async def _dry_run(options: argparse.Namespace, config: PeerConfig) -> None:
    from petals.cli.dry_run import show_plan

    with _tracing(options) as client:
        asked = client if options.chat or options.generate is not None or options.http is not None else None
        tokens = options.max_new_tokens or (64 if options.generate is not None else 512)
        await show_plan(config, asked, tokens, _say, as_json=options.json)


def _check(options: argparse.Namespace) -> None:
    if options.new_swarm and (options.initial_peers or options.invitation):
        raise UserError("--new_swarm starts a swarm, --initial_peers and --invitation join one: give one of them")
    if options.new_swarm and options.swarm:
        raise UserError("--new_swarm joins nobody, --swarm names a swarm of the local network: give one of them")
    serves = options.serve is not None or options.num_blocks is not None
    if options.serve and options.num_blocks is not None:
        raise UserError("--serve says which blocks, --num_blocks lets the peer choose: give one of them")
    if options.trace is not None and not options.chat and options.generate is None:
        raise UserError("--trace is about what --generate or --chat asks: give one of them, too")
    if options.http is None and (options.api_keys or options.cors or options.http_models or options.http_hosts):
        raise UserError("--api_keys, --cors, --http_hosts and --http_models are about --http: give it, too")
    if options.json_schema is not None and options.generate is None:
        raise UserError("--json_schema is about --generate: give it, too")
    if options.audit_at_home and not options.audit:
        raise UserError("--audit_at_home is about --audit: give --audit 0.05, too")
    if (
        (options.local_blocks or options.audit)
        and not options.chat
        and options.generate is None
        and options.http is None
    ):
        raise UserError(
            "--local_blocks and --audit are about what this peer asks: give --generate, --chat or --http, too"
        )
    if options.bootstrap:
        if serves or options.chat or options.generate is not None or options.http is not None or options.dry_run:
            raise UserError("--bootstrap only keeps the directory: leave it out to serve, ask, chat or open a door")
        return
    if options.chat and (
        (options.json and not options.dry_run) or options.generate is not None or options.http is not None
    ):
        raise UserError("--chat is for people and asks for its own prompts: leave --json, --generate and --http out")
    if options.system is not None and not options.chat:
        raise UserError("--system is for --chat")
    if options.http is not None and options.generate is not None:
        raise UserError("--generate asks once and ends, --http stays open: give one of them")
    asks = options.chat or options.generate is not None or options.http is not None
    if not serves and not asks:
        raise UserError('nothing to do: give --serve A:B to hold blocks, --generate "...", --chat or --http to ask')
    if options.invitation is not None and options.identity is None:
        _say("an invitation holds for the peer ID that uses it first: give --identity FILE to be the same peer again")
    alone = options.no_mdns or _stays_here(options)
    if not serves and not options.initial_peers and options.invitation is None and alone:
        raise UserError("nobody to ask: give --initial_peers ADDR, or hold the blocks here with --serve")


@contextmanager
def _door(options: argparse.Namespace) -> Iterator[Door]:
    from petals.gateway.config import HttpConfig
    from petals.gateway.server import Door

    config = HttpConfig(
        bind=options.http,
        api_keys=options.api_keys,
        cors=tuple(options.cors),
        hosts=tuple(options.http_hosts),
        models=tuple(options.http_models),
    )
    if not config.is_loopback and config.api_keys is None:
        _say(f"whoever reaches {config.bind} may ask here; --api_keys FILE lets only those in who have a key")
    with Door(config) as door:
        yield door


async def _keep_door(peer: Peer, door: Door, *, as_json: bool) -> None:
    import trio

    from petals.gateway.server import open_gateway

    async with open_gateway(peer, door) as url:
        if as_json:
            print(json.dumps({"http": url}), flush=True)
        _say(f"open {url} in a browser; OpenAI's clients take base_url={url}/v1")
        client = await peer.client()
        try:
            await client.watcher.wait_for(range(client.checkpoint.num_blocks), trio.current_time() + LOOK_S)
        except MissingBlocks as missing:
            blocks = describe_blocks(missing.blocks)
            _say(f"nobody holds {blocks} yet: answers wait until a peer that serves them joins (petals peer --serve)")
        await trio.sleep_forever()


def _wanted(options: argparse.Namespace, max_new_tokens: int) -> GenerationOptions:
    from petals.peer.client.generation.generation_options import GenerationOptions

    most = options.max_new_tokens or max_new_tokens
    schema = None if options.json_schema is None else _read_schema(options.json_schema)
    if options.temperature == 0:
        return GenerationOptions(max_new_tokens=most, json_schema=schema, drafts=options.drafts)
    return GenerationOptions(
        max_new_tokens=most,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        drafts=options.drafts,
        json_schema=schema,
    )


def _read_schema(path: Path) -> str:
    from petals.peer.client.constraints import Constraint

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        Constraint.json_schema(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return text


@contextmanager
def _tracing(options: argparse.Namespace) -> Iterator[ClientOptions]:
    """What is wanted of the swarm; steps are traced while the context is open, where that is wanted too."""
    from petals.peer.client.model_client import ClientOptions
    from petals.peer.client.tracing import TraceFile

    with nullcontext() if options.trace is None else TraceFile(options.trace, _say) as trace:
        yield ClientOptions(
            compression=options.compression,
            head_quant=options.head_quant,
            active_adapter=options.active_adapter,
            local_blocks=tuple(options.local_blocks),
            audit=options.audit,
            audit_at_home=options.audit_at_home,
            show_route=options.show_route,
            on_step=None if trace is None else trace.note,
        )


@dataclasses.dataclass
class _Asked:
    """What `--generate` has to answer for, at whatever moment it ends."""

    prompt: str
    as_json: bool
    start_s: float = 0.0
    """Until the peer was ready."""
    stream: TokenStream | None = None

    def cut_off(self) -> None:
        """Say what there is of the answer: a signal has ended it."""
        hush()
        count = 0 if self.stream is None else len(self.stream.token_ids)
        if self.stream is not None and self.stream.finish_reason is not None:
            return  # the answer is whole; what was cut off came after it
        if not self.as_json:
            if count:
                print(flush=True)
            _say(f"cut off after {count} tokens")
        elif self.stream is None:
            nothing = {"prompt": self.prompt, "text": "", "token_ids": [], "finish_reason": "cancelled"}
            print(json.dumps(nothing), flush=True)
        else:
            print(json.dumps(_as_json(self.stream, self.prompt, self.start_s)), flush=True)


async def _generate(peer: Peer, options: argparse.Namespace, client: ClientOptions, asked: _Asked) -> None:
    stream = await peer.generate(options.generate, options=_wanted(options, 64), client=client)
    asked.stream = stream
    text = options.generate  # said with the first token: a passing line would overwrite it
    async with stream:
        with ExitStack() as waiting:
            waiting.enter_context(counting_seconds(_say, f"computing {len(stream.prompt_ids)} tokens of prompt"))
            async for token in stream:
                waiting.close()
                hush()
                if not options.json:
                    print(text + on_terminal(token.text), end="", flush=True)
                text = ""
    if not options.json:
        print(text, flush=True)
        _say(summary(stream))
    audits = await _audits(peer, client)
    if options.json:
        print(json.dumps(_as_json(stream, options.generate, asked.start_s) | audits), flush=True)


async def _audits(peer: Peer, wanted: ClientOptions) -> dict[str, Any]:
    """Wait for those under way, and say what came of them."""
    if not wanted.audit:
        return {}
    trust = await (await peer.client()).audited()
    _say(f"{trust.audited} answers were computed again, {trust.unchecked} could not be; wrong: {len(trust.findings)}")
    findings = [
        {
            "peer_id": each.peer_id,
            "verdict": each.verdict.name.lower(),
            "blocks": [each.blocks.start, each.blocks.stop],
            "position": each.position,
            "error": each.error,
            "tolerance": each.tolerance,
        }
        for each in trust.findings
    ]
    return {"audits": {"audited": trust.audited, "unchecked": trust.unchecked, "findings": findings}}


def summary(stream: TokenStream) -> str:
    """One line: who answered, and how fast."""
    route = " => ".join(legs(hop.as_json() for hop in stream.route))
    return f"route {route}; {len(stream.token_ids)} tokens, {stream.tokens_per_s:.1f} tokens/s"


def _as_json(stream: TokenStream, prompt: str, start_s: float) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": stream.text,
        "token_ids": stream.token_ids,
        "finish_reason": stream.finish_reason or "cancelled",
        "prompt_token_ids": stream.prompt_ids,
        "reused_tokens": stream.reused_tokens,
        "route": [hop.as_json() for hop in stream.route],
        **({} if stream.choice is None else stream.choice.as_json()),
        "seconds": {"start": start_s, **dataclasses.asdict(stream.seconds)},
        "tokens_per_s": stream.tokens_per_s,
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
