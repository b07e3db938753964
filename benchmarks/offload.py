"""A model that does not fit into memory: offloaded to disk in one process, or held by a swarm of such processes.

    python benchmarks/offload.py [--memory_mb 1300] [--servers 3] [--tokens 8]

Random float32 weights in the shape of a Llama of 24 layers x 1,024 (1.9 GB). Every process - the one that offloads
with `accelerate`, each server, the client - runs in a memory cgroup of its own with the same limit, which counts the
pages of files that the kernel keeps, so that no disk is memory in truth. Needs root and cgroup v1 or v2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from servers import server

PROMPT_TOKENS = 8
SHARE = 0.45
"""Of the limit that weights may take in the process that offloads; the rest is Python, torch and what is being read."""


@contextmanager
def limited(name: str, memory_mb: int) -> Iterator[list[str]]:
    """A command that runs the command that follows within `memory_mb`."""
    second = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    group = Path("/sys/fs/cgroup", "" if second else "memory", f"petals-{os.getpid()}-{name}")
    group.mkdir()
    try:
        limit = group / ("memory.max" if second else "memory.limit_in_bytes")
        limit.write_text(str(memory_mb << 20))
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "limited"]
    finally:
        group.rmdir()


def forget_pages(directory: Path) -> None:
    """Let the kernel drop its copies of freshly written files: they are counted as ours, and nobody's limit."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def offloaded(directory: str, memory_mb: int) -> Callable[[int], Any]:
    """Generate with what accelerate makes of it."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, device_map="auto", offload_folder=folder,
            max_memory={"cpu": f"{int(SHARE * memory_mb)}MB"},
        )  # fmt: skip
    on_disk = sum(device == "disk" for device in model.hf_device_map.values())
    assert on_disk, "it fits: lower --memory_mb"
    print(f"{on_disk} of {len(model.hf_device_map)} modules are on disk", file=sys.stderr)
    return lambda tokens: model.generate(
        torch.arange(PROMPT_TOKENS)[None], max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )


def measure(generate: Callable[[int], Any], tokens: int) -> None:
    """Print tokens per second of decoding."""
    generate(1)
    seconds = []
    for count in (1, tokens + 1):
        started = time.perf_counter()
        generate(count)
        seconds.append(time.perf_counter() - started)
    print(json.dumps(tokens / (seconds[1] - seconds[0])))


def child(kind: str, directory: str, address: str, options: argparse.Namespace) -> None:
    """What runs inside of a limit."""
    if kind == "offload":
        measure(offloaded(directory, options.memory_mb), options.tokens)
        return
    import torch

    from petals import AutoDistributedModelForCausalLM, connect

    with connect(address, model=directory) as peer:
        model = AutoDistributedModelForCausalLM.from_pretrained(peer=peer)
        ids = torch.arange(PROMPT_TOKENS)[None]
        measure(lambda n: model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False), 4 * options.tokens)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory_mb", type=int, default=1300)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child, options)
        return
    from shapes import model_of

    speeds: dict[str, float] = {}
    with model_of("llama-24x1024") as directory, ExitStack() as stack:
        assert directory is not None

        forget_pages(Path(directory))

        def run(kind: str, address: str) -> float:
            with limited(kind, options.memory_mb) as inside:
                words = [sys.executable, __file__, "--child", kind, directory, address]
                sizes = ["--memory_mb", str(options.memory_mb), "--tokens", str(options.tokens)]
                done = subprocess.run([*inside, *words, *sizes], check=True, stdout=subprocess.PIPE, text=True)
            return float(json.loads(done.stdout.splitlines()[-1]))

        speeds["accelerate, offloaded to disk"] = run("offload", "-")
        bounds = [24 * index // options.servers for index in range(options.servers + 1)]
        first: list[str] = []
        for start, stop in pairwise(bounds):
            inside = stack.enter_context(limited(f"server-{start}", options.memory_mb))
            words = [directory, "--serve", f"{start}:{stop}", "--cache_mb", "64"]
            joining = ["--initial_peers", *first] if first else []
            found = stack.enter_context(server(*words, *joining, inside=inside))
            first = first or [found]
        speeds[f"swarm of {options.servers} servers and a client"] = run("client", first[0])
    base = next(iter(speeds.values()))
    print(f"1.9 GB of weights, every process within {options.memory_mb} MiB\n")
    print("| decode | tokens/s | ratio |\n|---|---|---|")
    for name, speed in speeds.items():
        print(f"| {name} | {speed:.2f} | {speed / base:.1f} |")


if __name__ == "__main__":
    main()
