"""`petals bench`: this machine's own figures."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from petals.cli.base.argument_types import at_least_1
from petals.cli.base.file_arguments import token_of
from petals.cli.base.terminal import say


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "bench",
        help="measure this machine: blocks, memory, transport",
        description="Measure how many blocks per second this machine passes in each form, how fast it reads memory, "
        "and how fast the transport is on loopback. About a minute with the default model. Close other programs first.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="as of `petals peer` (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument(
        "--num_blocks", metavar="N", type=at_least_1, help="how many blocks to load (default: 150 MB of them)"
    )
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"),
                        default=["float32", "bfloat16"],
                        help="what to compute in (default: float32 bfloat16)")  # fmt: skip
    parser.add_argument("--quant_type", nargs="+", choices=("none", "int8", "nf4"), default=["none", "int8"],
                        help="forms of the weights (default: none int8)")  # fmt: skip
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--token", help="for private hub models; @FILE: what is in it")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--verbose", "-v", action="store_true", help="logs of what happens, on stderr")
    parser.set_defaults(run=run, synchronous=False)


async def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    began = time.perf_counter()
    say("starting (torch takes a few seconds to import)")
    import trio

    from petals.models.source.checkpoint import open_checkpoint
    from petals.peer.server.measure import run_bench

    checkpoint = await trio.to_thread.run_sync(
        lambda: open_checkpoint(options.model, revision=options.revision, token=token_of(options.token), progress=say)
    )
    found = await run_bench(checkpoint, options.num_blocks, options.dtype, options.quant_type, say)
    print(json.dumps(found) if options.json else describe(found), flush=True)
    say(f"took {time.perf_counter() - began:.0f} s")


def describe(found: dict[str, Any]) -> str:
    """A table for people."""
    lines = [
        f"{found['device']}: reads weights at {found['memory_read_gb_s']:.1f} GB/s, multiplies at "
        f"{found['gigaflops']:.0f} GFLOP/s (float32)",
        f"transport on loopback: {found['transport']['mb_s']:,.0f} MB/s, round trip "
        f"{1e3 * found['transport']['round_trip_s']:.2f} ms",
        "",
        f"{found['measured_blocks']} of {found['num_blocks']} blocks of {found['model']}; ratios to transformers' own "
        "layers in float32",
        f"{'form':<16} {'path':<13} {'MB/block':>9} {'decode blocks/s':>16} {'ratio':>6} {'of memory':>10} "
        f"{'prefill blocks/s':>17} {'ratio':>6}",
    ]
    for each in found["blocks"]:
        share = "cached" if each["of_memory_bound"] is None else f"{each['of_memory_bound']:.0%}"
        form = each["dtype"] if each["quant_type"] == "none" else f"{each['dtype']} {each['quant_type']}"
        lines.append(
            f"{form:<16} {each['path']:<13} {each['block_bytes'] / 1e6:>9.1f} {each['decode_blocks_per_s']:>16,.0f} "
            f"{_ratio(each['decode_ratio'])} {share:>10} {each['prefill_blocks_per_s']:>17,.0f} "
            f"{_ratio(each['prefill_ratio'])}"
        )
    if any(each["of_memory_bound"] is None for each in found["blocks"]):
        lines.append(
            "cached: so few blocks that the processor's caches hold them; a server of more, which reads them from "
            "memory, is slower"
        )
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.2f'):>6}"
