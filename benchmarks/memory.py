"""Peak memory of a process that loads some blocks of a checkpoint: the span's size, not the model's.

python benchmarks/memory.py                    # 12 of 24 blocks of a bloom-560m-shaped random checkpoint
python benchmarks/memory.py --hidden 256 --vocab 1000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

_LOAD = """
import json, sys, time
import torch, transformers.models.bloom.modeling_bloom
from petals.models.source.checkpoint import open_checkpoint
from petals.models.kernels.backends import usable
from petals.models.kernels.float16_weights import can_halve
from petals.models.source.loading import load_span

def peak():  # not ru_maxrss, which an exec inherits from the parent
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])

def resident():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1])

directory, start, stop, quant_type = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
checkpoint = open_checkpoint(directory)
torch.nn.Linear(8, 8)(torch.zeros(1, 8))
can_halve(), usable()  # what torch's libraries allocate for themselves
before, least = peak(), resident()
began = time.perf_counter()
span = load_span(checkpoint, range(start, stop), dtype=torch.float32, quant_type=quant_type)
seconds = time.perf_counter() - began
figures = {"before": before, "peak": peak(), "weights": span.weight_bytes, "seconds": seconds}
print(json.dumps({**figures, "held": resident() - least}))
"""


def write_checkpoint(directory: Path, *, hidden: int, blocks: int, vocab: int, stored: str = "float32") -> int:
    """A BLOOM checkpoint of random weights, one shard per 200 MB; returns its bytes."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=vocab, hidden_size=hidden, n_layer=blocks, n_head=16)
    BloomForCausalLM(config).to(getattr(torch, stored)).save_pretrained(directory, max_shard_size="200MB")
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def measure(directory: Path, blocks: range, quant_type: str = "none") -> dict[str, float]:
    """Bytes and seconds of loading `blocks` in a process of its own."""
    command = [sys.executable, "-c", _LOAD, str(directory), str(blocks.start), str(blocks.stop), quant_type]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=250_880)
    parser.add_argument("--load", type=int, default=12, help="how many blocks to load")
    parser.add_argument("--quant_type", default="none")
    args = parser.parse_args()
    print(f"{args.load} of {args.blocks} blocks of hidden size {args.hidden}, {args.quant_type}, computed in float32\n")
    print("| stored in | file, MB | weights in memory | growth of the peak | whole process | seconds |")
    print("|---|---|---|---|---|---|")
    for stored in ("float16", "float32"):
        with tempfile.TemporaryDirectory() as directory:
            total = write_checkpoint(
                Path(directory), hidden=args.hidden, blocks=args.blocks, vocab=args.vocab, stored=stored
            )
            result = measure(Path(directory), range(args.load), args.quant_type)
        figures = (total, result["weights"], result["peak"] - result["before"], result["peak"])
        megabytes = " | ".join(f"{figure / 1e6:,.1f}" for figure in figures)
        print(f"| {stored} | {megabytes} | {result['seconds']:.1f} |")


if __name__ == "__main__":
    main()
