"""How far honest answers differ, how far wrong ones do, whether honest servers are ever blamed, and what audits cost.

    python benchmarks/audits.py spread [--tokens 40]        the default model: every way an honest server may compute
    python benchmarks/audits.py honest [--comparisons 10000]  a tiny model: as many comparisons, threads and ways mixed
    python benchmarks/audits.py sign                        one answer's digests and signature
    python benchmarks/audits.py cost [--tokens 64]          tokens per second without and with audits, as ratios
    python benchmarks/audits.py cost --rates 1 --threads 2  every answer, by servers with other numbers of threads

The cost is of two stages of the default model with two servers each, all processes of one thread on this machine: the
auditors take their cores from those who are audited, which is the worst case.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import trio
from servers import server, table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from petals import PeerConfig, open_peer
from petals.models.blocks.block import BlockSpan
from petals.models.source.checkpoint import Checkpoint, open_checkpoint
from petals.models.source.loading import load_span
from petals.peer.base.identity import create_identity, verify
from petals.peer.client.audit.comparison import error_between, tolerance_of
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.client.model_client import ClientOptions
from petals.protocols.tensors import digest_tensor

PROMPT = "In 1492 Columbus sailed the ocean blue; def f(x): return x**2  # and so on. The quick brown fox jumps. "


def told(span: BlockSpan, hidden: Tensor, boundaries: list[int]) -> Tensor:
    """The span's outputs, `hidden` told in steps that end at `boundaries`."""
    cache = span.new_cache(span.blocks, hidden.shape[0], hidden.shape[1])
    begins = [0, *boundaries[:-1]]
    steps = [span.step(hidden[:, begin:end], cache) for begin, end in zip(begins, boundaries, strict=True)]
    return torch.cat(steps, dim=1)


def shared(span: BlockSpan, hidden: Tensor, first: int) -> Tensor:
    """The same, decoding in passes with two other sessions after a prompt of `first` tokens."""
    caches = [span.new_cache(span.blocks, 1, hidden.shape[1]) for _ in range(3)]
    outputs = span.step_together([hidden[:, :first], 0.9 * hidden[:, :first], 1.1 * hidden[:, :first]], caches)[:1]
    for index in range(first, hidden.shape[1]):
        token = hidden[:, index : index + 1]
        outputs.append(span.step_together([token, 0.9 * token, 1.1 * token], caches)[0])
    return torch.cat(outputs, dim=1)


def ways(span: BlockSpan, hidden: Tensor, first: int) -> dict[str, Tensor]:
    """Every way in which an honest server may come to its answers."""
    tokens, found = hidden.shape[1], {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        one_by_one = [first, *range(first + 1, tokens + 1)]
        found[f"decode, {threads} threads"] = told(span, hidden, one_by_one)
        found[f"prompt, {threads} threads"] = told(span, hidden, [tokens])
        found[f"sevens, {threads} threads"] = told(span, hidden, [*range(7, tokens, 7), tokens])
        if hidden.shape[0] == 1 and span.lean:
            found[f"shared, {threads} threads"] = shared(span, hidden, first)
        with span.library_path():
            found[f"library, {threads} threads"] = told(span, hidden, one_by_one)
    return found


def spread(options: argparse.Namespace) -> None:
    """Print how far they are apart, and how far what servers may pass off as it is from the truth."""
    checkpoint = open_checkpoint()
    ids = checkpoint.tokenizer()(PROMPT * 4, return_tensors="pt")["input_ids"][:, : options.tokens]
    model = AutoModelForCausalLM.from_pretrained(str(checkpoint.directory), dtype=torch.float32)
    embedded = model.get_input_embeddings()(ids)
    print("| blocks | said | honest, at most | tolerance | really | error, row by row (min - max) |")
    print("|---|---|---|---|---|---|")
    for blocks in (range(2), range(12, 18), range(30)):
        hidden = embedded
        if blocks.start:
            hidden = told(load_span(checkpoint, range(blocks.start)), embedded, [options.tokens])
        answers: dict[tuple[str, str], Tensor] = {}
        for dtype, quant_type in (("float32", "none"), ("float32", "int8"), ("bfloat16", "none"), ("bfloat16", "int8")):
            span = load_span(checkpoint, blocks, dtype=getattr(torch, dtype), quant_type=quant_type)
            span.calibrate()
            found = ways(span, hidden.to(span.dtype), 8)
            apart = max(error_between(one, other) for one, other in itertools.permutations(found.values(), 2))
            answers[dtype, quant_type] = found["decode, 1 threads"]
            print(f"| {blocks.start}:{blocks.stop} | {dtype}, {quant_type} | {apart:.1e} ", end="")
            print(f"| {tolerance_of(dtype, quant_type):.2g} | | |", flush=True)
        for said, really in itertools.permutations(answers, 2):
            errors = [
                error_between(answers[really][:, index : index + 1], answers[said][:, index : index + 1])
                for index in range(options.tokens)
            ]
            caught = "caught" if min(errors) > tolerance_of(*said) else "not always caught"
            print(f"| {blocks.start}:{blocks.stop} | {', '.join(said)} | | {tolerance_of(*said):.2g} ", end="")
            print(f"| {', '.join(really)} | {min(errors):.1e} - {max(errors):.1e}, {caught} |", flush=True)


def tiny(directory: str) -> Checkpoint:
    """A model of two blocks, in a directory."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(directory)
    return open_checkpoint(directory)


def honest(options: argparse.Namespace) -> None:
    """Count how often two honest answers would have been called a lie."""
    dice = random.Random(0)
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        checkpoint = tiny(directory)
        print("| precision | answers compared | largest error | tolerance | called a lie |\n|---|---|---|---|---|")
        for dtype, quant_type in (("float32", "none"), ("bfloat16", "none"), ("float32", "int8")):
            span = load_span(checkpoint, range(2), dtype=getattr(torch, dtype), quant_type=quant_type)
            errors: list[float] = []
            while len(errors) < options.comparisons:
                rows, tokens = dice.choice((1, 1, 2)), dice.randint(12, 40)
                hidden = torch.randn(rows, tokens, 64).to(span.dtype) * dice.choice((0.1, 1.0, 10.0))
                found = list(ways(span, hidden, dice.randint(1, 8)).values())
                one, other = dice.sample(found, 2)
                errors += [error_between(one[:, i : i + 1], other[:, i : i + 1]) for i in range(tokens)]
            tolerance = tolerance_of(dtype, quant_type)
            wrong = sum(error > tolerance for error in errors)
            print(
                f"| {dtype}, {quant_type} | {len(errors)} | {max(errors):.1e} | {tolerance:.2g} | {wrong} |", flush=True
            )


def sign(options: argparse.Namespace) -> None:
    """Microseconds of what a signed answer takes more, at both ends."""
    identity, data = create_identity(), bytes(250)
    signature = identity.sign(data)
    step = torch.randn(1, 1, 4096)

    def microseconds(work: object, rounds: int = 2000) -> float:
        assert callable(work)
        started = time.perf_counter()
        for _ in range(rounds):
            work()
        return 1e6 * (time.perf_counter() - started) / rounds

    print(f"sign {microseconds(partial(identity.sign, data)):.0f} us, ", end="")
    print(
        f"verify {microseconds(partial(verify, identity.peer_id, identity.public_key, data, signature)):.0f} us, ",
        end="",
    )
    print(f"digest of one token of 4,096 {microseconds(partial(digest_tensor, step)):.0f} us", end="")
    prompt = torch.randn(1, 1024, 4096)
    print(f", of a prompt of 1,024 {microseconds(partial(digest_tensor, prompt), 5) / 1000:.0f} ms")


def servers_cpu_s() -> float:
    """CPU seconds of our child processes so far: unlike the clock, they do not count who else uses the machine."""
    children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    ticks = 0
    for child in children.split():
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def ask(address: str, options: argparse.Namespace) -> None:
    """Generate in turns and print the ratios."""
    seconds: dict[str, list[float]] = {f"audit {rate:g}": [] for rate in options.rates}
    cpu_s: dict[str, list[float]] = {name: [] for name in seconds}
    async with open_peer(PeerConfig(initial_peers=(address,)), progress=lambda _: None) as peer:
        client = await peer.client()
        for index in range(options.rounds + 1):
            for rate in options.rates:
                before = servers_cpu_s()
                stream = await peer.generate(
                    PROMPT,
                    options=GenerationOptions(max_new_tokens=options.tokens),
                    client=ClientOptions(audit=rate, prefix_cache=False),
                )
                async with stream:
                    async for _ in stream:
                        pass
                await client.audited()
                if index:
                    seconds[f"audit {rate:g}"].append((options.tokens - 1) / stream.tokens_per_s)
                    cpu_s[f"audit {rate:g}"].append(servers_cpu_s() - before)
        print(table("decoding", seconds, options.tokens - 1, "tokens/s"), "\n")
        print(table("all servers, prompt and audits included", cpu_s, options.tokens, "tokens per CPU second"))
        trust = client.trust
        print(
            f"\n{trust.audited} answers were computed again, {trust.unchecked} could not be; "
            f"wrong: {len(trust.findings)}"
        )


def cost(options: argparse.Namespace) -> None:
    """Start four servers, measure."""
    with ExitStack() as stack:
        joining: tuple[str, ...] = ()
        for index, blocks in enumerate(("0:15", "15:30") * 2):
            threads = 1 if index < 2 else options.threads
            address = stack.enter_context(server("--serve", blocks, "--throughput", "100", *joining, threads=threads))
            joining = joining or ("--initial_peers", address)
        trio.run(ask, joining[1], options)


def main() -> None:
    """Do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("spread", "honest", "sign", "cost"))
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--comparisons", type=int, default=10_000, help="for each precision")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.05, 0.2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the second server of each stage")
    options = parser.parse_args()
    with torch.inference_mode():
        {"spread": spread, "honest": honest, "sign": sign, "cost": cost}[options.what](options)


if __name__ == "__main__":
    main()
