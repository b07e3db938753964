"""This machine's own figures: its memory and arithmetic, its blocks per second, its transport. For `petals bench`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import trio

from petals.models.kernels.machine import describe_device, gigabytes, gigaflops
from petals.models.source.checkpoint import Checkpoint
from petals.models.source.loading import block_numel, load_span
from petals.peer.base.identity import create_identity
from petals.peer.engine.throughput import Throughput, measure_throughput
from petals.peer.net.host import Host, HostConfig, open_host
from petals.protocols.errors import UserError
from petals.protocols.stream import ByteStream
from petals.protocols.tensors import FLOATS_BY_NAME
from petals.protocols.types import PeerId

SAMPLE_BYTES = 150e6
"""Weights, in float32, that the default number of blocks has: more than most caches hold, soon loaded."""
CACHED = 1.5
"""Weights that are read so many times as fast as memory gives come from a cache. Measured, not looked up: what the
system says of caches is often the whole machine's, of which we have a share. Twice what a cache holds is still read 1.3
times as fast (71 and 36 MB on a machine with 32, one block of 7 MB 2.5 times; 2026-11-28)."""
DECODE_STEPS = 12
PROTOCOL = "/petals/bench/1"
PIECE = bytes(1 << 20)
PIECES = 128
PINGS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The limits."""

    device: str
    threads: int
    memory_read_gb_s: float
    gigaflops: float
    """float32 matrix products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpeed:
    """One way to hold the same blocks."""

    dtype: str
    quant_type: str
    path: str
    """"transformers": the library's own layers; "lean": ours for steps of few rows, where the model has one."""
    weight_bytes: int
    """Of one block."""
    read_gb_s: float
    """What reads as many bytes as all the measured blocks have, over and over: memory, or caches where they are few."""
    speed: Throughput
    prefill_tokens: int
    """Of the prompt measured."""

    @property
    def bound(self) -> float:
        """Decode blocks per second if nothing but reading the weights took time."""
        return self.read_gb_s * 1e9 / self.weight_bytes

    def is_cached(self, machine: Machine) -> bool:
        """Whether caches held the blocks, as they would not hold a server's many."""
        return self.read_gb_s > CACHED * machine.memory_read_gb_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """Two of our hosts on loopback, in one process."""

    mb_s: float
    """One stream, one way."""
    round_trip_s: float
    """Of a ping; the median."""


def measure_machine(hidden_size: int) -> Machine:
    """About a second."""
    return Machine(
        device=describe_device(),
        threads=torch.get_num_threads(),
        memory_read_gb_s=gigabytes(hidden_size),
        gigaflops=gigaflops(hidden_size),
    )


def sample_blocks(checkpoint: Checkpoint, wanted: int | None) -> range:
    """The first blocks: so many, or as many as make a fair sample."""
    if wanted is None:
        wanted = max(1, min(checkpoint.num_blocks, int(SAMPLE_BYTES // (4 * block_numel(checkpoint.config)))))
    if not 0 < wanted <= checkpoint.num_blocks:
        raise UserError(f"{checkpoint.name} has {checkpoint.num_blocks} blocks; {wanted} is not a number of them")
    return range(wanted)


def measure_blocks(
    checkpoint: Checkpoint, blocks: range, dtype: str, quant_type: str, *, prefill_tokens: int = 128
) -> list[BlockSpeed]:
    """Load the blocks in this form and measure every path that they have; seconds for each.

    Raises:
        UserError: no such dtype. ModelError: blocks that can not be loaded so.
    """
    if dtype not in FLOATS_BY_NAME:
        raise UserError(f"unknown dtype {dtype!r}: choose {', '.join(FLOATS_BY_NAME)}")
    span = load_span(checkpoint, blocks, dtype=FLOATS_BY_NAME[dtype], quant_type=quant_type)
    measure = partial(measure_throughput, span, decode_steps=DECODE_STEPS, prefill_tokens=prefill_tokens)
    read_gb_s = gigabytes(checkpoint.hidden_size, total=span.weight_bytes)

    def result(path: str, speed: Throughput) -> BlockSpeed:
        return BlockSpeed(
            dtype=dtype,
            quant_type=quant_type,
            path=path,
            weight_bytes=span.weight_bytes // len(blocks),
            read_gb_s=read_gb_s,
            speed=speed,
            prefill_tokens=prefill_tokens,
        )

    with span.library_path():
        results = [result("transformers", measure())]
    if span.lean:
        results.append(result("lean", measure()))
    return results


async def measure_transport() -> Transport:
    """About a second: bytes one way over one stream of our transport, and pings."""
    settings = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
    async with (
        open_host(create_identity().key_pair, settings) as near,
        open_host(create_identity().key_pair, settings) as far,
    ):
        far.set_handler(PROTOCOL, _swallow)
        peer_id = await near.connect(far.addrs[0])
        pings = sorted([await near.ping(peer_id) for _ in range(PINGS)])
        return Transport(mb_s=await _one_way(near, peer_id), round_trip_s=pings[len(pings) // 2])


async def _one_way(near: Host, peer_id: PeerId) -> float:
    stream = await near.open_stream(peer_id, PROTOCOL)
    for warm in (True, False):
        began = trio.current_time()
        for _ in range(PIECES // 8 if warm else PIECES):
            await stream.write(PIECE)
        await stream.write(b"!")
        await stream.read(1)
    mb_s = PIECES * len(PIECE) / (trio.current_time() - began) / 1e6
    await stream.close()
    return mb_s


async def _swallow(stream: ByteStream) -> None:
    while data := await stream.read(1 << 20):
        if data[-1:] == b"!":  # the pieces are zeros
            await stream.write(b"!")


def as_json(machine: Machine, blocks: list[BlockSpeed], transport: Transport) -> dict[str, Any]:
    """For machines; ratios are to `transformers`' own layers in float32 where those were measured. What caches held
    says nothing of memory: its `of_memory_bound` is None."""
    base = next((each for each in blocks if (each.dtype, each.quant_type) == ("float32", "none")), None)
    return {
        "device": machine.device,
        "threads": machine.threads,
        "memory_read_gb_s": machine.memory_read_gb_s,
        "gigaflops": machine.gigaflops,
        "blocks": [
            {
                "dtype": each.dtype,
                "quant_type": each.quant_type,
                "path": each.path,
                "block_bytes": each.weight_bytes,
                "decode_blocks_per_s": each.speed.inference_rps,
                "prefill_blocks_per_s": each.speed.forward_rps,
                "prefill_tokens": each.prefill_tokens,
                "decode_ratio": base and each.speed.inference_rps / base.speed.inference_rps,
                "prefill_ratio": base and each.speed.forward_rps / base.speed.forward_rps,
                "read_gb_s": each.read_gb_s,
                "of_memory_bound": None if each.is_cached(machine) else each.speed.inference_rps / each.bound,
            }
            for each in blocks
        ],
        "transport": {"mb_s": transport.mb_s, "round_trip_s": transport.round_trip_s},
    }


async def run_bench(
    checkpoint: Checkpoint,
    wanted: int | None,
    dtypes: list[str],
    quant_types: list[str],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """All of it; a quantised form is measured once, in the first dtype."""
    blocks = sample_blocks(checkpoint, wanted)
    forms = [(dtype, quant) for quant, dtype in product(quant_types, dtypes) if quant == "none" or dtype == dtypes[0]]
    progress(f"1/{len(forms) + 2}: memory and arithmetic")
    machine = await trio.to_thread.run_sync(measure_machine, checkpoint.hidden_size)
    results: list[BlockSpeed] = []
    for number, (dtype, quant) in enumerate(forms, 2):
        kind = dtype if quant == "none" else f"{dtype}, {quant}"
        progress(
            f"{number}/{len(forms) + 2}: {len(blocks)} block{'s' * (len(blocks) > 1)} of {checkpoint.name}, {kind}"
        )
        results += await trio.to_thread.run_sync(measure_blocks, checkpoint, blocks, dtype, quant)
    progress(f"{len(forms) + 2}/{len(forms) + 2}: transport")
    found = as_json(machine, results, await measure_transport())
    return {"model": checkpoint.name, "num_blocks": checkpoint.num_blocks, "measured_blocks": len(blocks), **found}
