"""One block in the true shape of a model that people come for, in its own format, served by a peer of its own.

    nice python benchmarks/shapes_of_today.py [--only gpt-oss-120b ...] [--room DIR] [--threads N]

Random weights are written to DIR (one shape at a time, 12 GB at most, deleted afterwards). For each the table says the
bytes of the block in its file, what the server's memory grew by and its peak while loading, seconds to load,
milliseconds of a decode step and of a prompt of 512 tokens, and the time that reading the active bytes takes at the
bandwidth measured in the same run. A shape that does not fit into free memory is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import petals  # noqa: F401  # before torch, so that its threads do not keep cores from the server (docs/deploy.md)

# isort: split
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from petals import AutoDistributedModelForCausalLM, connect
from petals.models.kernels.machine import gigabytes

_COMMON: Mapping[str, Any] = {"vocab_size": 256, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": None}


@dataclass(frozen=True)
class Shape:
    """A block of a published model."""

    name: str
    form: str
    """"fp8", "mxfp4" or "bfloat16"."""
    model_type: str
    settings: Mapping[str, Any]
    used: float = 1.0
    """Share of the experts that a token is sent to."""

    def config(self) -> Any:
        return AutoConfig.for_model(self.model_type, **{**_COMMON, **self.settings})


_DEEPSEEK = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
}
SHAPES = (
    Shape("gpt-oss-120b", "mxfp4", "gpt_oss", {"num_local_experts": 128, "num_experts_per_tok": 4}, 4 / 128),
    Shape("DeepSeek-V3, dense block", "fp8", "deepseek_v3", {**_DEEPSEEK, "first_k_dense_replace": 1}),
    Shape(
        "Qwen3-235B-A22B-FP8",
        "fp8",
        "qwen3_moe",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
        8 / 128,
    ),
    Shape(
        "GLM-4.5-FP8",
        "fp8",
        "glm4_moe",
        {
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "n_routed_experts": 160,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 0,
            "use_qk_norm": True,
            "attention_bias": True,
        },
        8 / 160,
    ),
    Shape(
        "Llama-3.1-405B",
        "bfloat16",
        "llama",
        {
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
        },
    ),
    Shape("BLOOM-176B", "bfloat16", "bloom", {"hidden_size": 14336, "n_head": 112, "n_layer": 1}),
    Shape("DeepSeek-V3, expert block", "fp8", "deepseek_v3", {**_DEEPSEEK, "first_k_dense_replace": 0}, 8 / 256),
)


class Writer:
    """A safetensors file, written tensor by tensor from a pool of random bytes."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """`tensors`: dtype and shape by name."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1 << 24, generator=generator)
        self._pools = {
            "F8_E4M3": noise.to(torch.float8_e4m3fn),
            "BF16": (0.02 * noise).bfloat16(),
            "U8": torch.randint(0, 256, (1 << 25,), dtype=torch.uint8, generator=generator),
            "E8M0": torch.full((1 << 24,), 119, dtype=torch.uint8),
            "F32": torch.full((1 << 22,), 0.02),
        }
        header, begin = dict[str, Any](), 0
        for name, (dtype, shape) in tensors.items():
            size = math.prod(shape) * self._pools[dtype].itemsize
            stored = "U8" if dtype == "E8M0" else dtype
            header[name] = {"dtype": stored, "shape": shape, "data_offsets": [begin, begin + size]}
            begin += size
        packed = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(packed)) + packed)
            for dtype, shape in tensors.values():
                self._write(file, dtype, math.prod(shape))

    def _write(self, file: Any, dtype: str, count: int) -> None:
        pool = self._pools[dtype]
        for first in range(0, count, len(pool)):
            file.write(pool[: min(len(pool), count - first)].view(torch.uint8).numpy())


def tensors_of(shape: Shape) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of a checkpoint's tensors, by name."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(shape.config()).state_dict()
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in state.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found.update(_experts(shape, name, tuple(tensor.shape)))
        elif shape.form == "fp8" and tensor.ndim == 2 and ".layers." in name and not name.endswith("mlp.gate.weight"):
            found.update(_fp8(name, tuple(tensor.shape)))
        else:
            found[name] = ("BF16", tuple(tensor.shape))
    return found


def _fp8(name: str, size: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    blocks = (-(-size[0] // 128), -(-size[1] // 128))
    return {name: ("F8_E4M3", size), f"{name}_scale_inv": ("F32", blocks)}


def _experts(shape: Shape, name: str, size: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    if shape.form == "mxfp4":
        count, width, out = size
        groups = width // 32
        return {f"{name}_blocks": ("U8", (count, out, groups, 16)), f"{name}_scales": ("E8M0", (count, out, groups))}
    count, out, width = size
    stem, _, leaf = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for expert in range(count):
        for part in parts:
            found.update(_fp8(f"{stem}.{expert}.{part}.weight", (out // len(parts), width)))
    return found


def write(shape: Shape, directory: Path) -> tuple[int, int]:
    """Write the checkpoint; bytes of the block in its file, and of them those that one token needs."""
    tensors = tensors_of(shape)
    config = shape.config().to_dict() | {"dtype": "bfloat16", "architectures": []}
    if shape.form == "fp8":
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    elif shape.form == "mxfp4":
        config["quantization_config"] = {"quant_method": "mxfp4"}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, default=str))
    Writer(directory / "model.safetensors", tensors)
    sizes = {"F8_E4M3": 1, "BF16": 2, "U8": 1, "E8M0": 1, "F32": 4}
    total = active = 0.0
    for name, (dtype, size) in tensors.items():
        if ".layers." in name or ".h." in name:
            nbytes = sizes[dtype] * math.prod(size)
            total += nbytes
            active += nbytes * (shape.used if ".experts." in name else 1.0)
    return int(total), int(active)


def memory_of(pid: int) -> tuple[int, int]:
    """Resident bytes that belong to the process alone, and the most there ever were."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    said = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "VmHWM"))}
    return said["RssAnon"], said["VmHWM"]


@contextmanager
def serving(directory: Path, threads: int) -> Iterator[tuple[str, int, float]]:
    """A peer that serves the block; its address, its process, and seconds until it serves."""
    words = ["--serve", "0:1", "--new_swarm", "--cache_mb", "512", "--json"]
    environment = os.environ | {"PETALS_LISTEN": "/ip4/127.0.0.1/tcp/0", "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    command = [sys.executable, "-m", "petals.cli.main", "peer", str(directory), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            yield json.loads(line)["addrs"][0], process.pid, time.perf_counter() - started
        finally:
            process.send_signal(signal.SIGTERM)


def steps(address: str, directory: Path, hidden_size: int) -> tuple[float, float]:
    """Milliseconds of a decode step, median, and of a prompt of 512 tokens."""
    hidden = torch.randn(1, 512, hidden_size, generator=torch.Generator().manual_seed(1))
    with connect(address) as peer, torch.no_grad():
        model = AutoDistributedModelForCausalLM.from_pretrained(str(directory), peer=peer)
        with model.inference_session(max_length=640) as session:
            session.step(hidden[:, :1])
            decode = []
            for token in range(1, 25):
                started = time.perf_counter()
                session.step(hidden[:, token : token + 1])
                decode.append(time.perf_counter() - started)
        with model.inference_session(max_length=640) as session:
            started = time.perf_counter()
            session.step(hidden)
            prompt = time.perf_counter() - started
    return 1e3 * statistics.median(decode[4:]), 1e3 * prompt


def run(shape: Shape, room: Path, threads: int, empty: int) -> str:
    """A row of the table; `empty`: memory of a peer with a tiny block."""
    directory = room / "block"
    try:
        total, active = write(shape, directory)
        free = psutil.virtual_memory().available
        if free < 1.25 * total + (2 << 30):
            return f"| {shape.name} | {shape.form} | {total / 1e6:,.0f} | not measured: {free / 1e6:,.0f} MB are free |"
        bandwidth = gigabytes(1024)
        with serving(directory, threads) as (address, pid, seconds):
            resident, peak = memory_of(pid)
            decode, prompt = steps(address, directory, shape.config().hidden_size)
        reading = 1e3 * active / bandwidth / 1e9
        return (
            f"| {shape.name} | {shape.form} | {total / 1e6:,.0f} | {(resident - empty) / 1e6:,.0f} | "
            f"{(peak - empty) / 1e6:,.0f} | {seconds:.0f} | {active / 1e6:,.0f} | {reading:.1f} | {decode:.1f} | "
            f"{decode / reading:.1f} | {prompt:,.0f} |"
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


TINY = Shape("tiny", "bfloat16", "llama", {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of shapes, or their beginnings")
    parser.add_argument("--room", type=Path, default=None)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    chosen = [shape for shape in SHAPES if not args.only or shape.name.startswith(tuple(args.only))]
    with tempfile.TemporaryDirectory(dir=args.room) as directory:
        room = Path(directory)
        write(TINY, room / "tiny")
        with serving(room / "tiny", args.threads) as (_, pid, _seconds):
            empty = memory_of(pid)[0]
        print(
            "| block of | in | file, MB | memory, MB | peak, MB | loaded in, s | active MB | reading them, ms | "
            "step, ms | ratio | 512 tokens, ms |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for shape in chosen:
            print(run(shape, room, args.threads, empty), flush=True)


if __name__ == "__main__":
    main()
