"""What quantised blocks cost and keep: bytes, loss on real text, speed. The default model, one process, no network.

    python benchmarks/quantization.py              # a Markdown table; docs/models.md has one
    python benchmarks/quantization.py --formats    # the same for checkpoints that are quantised already

For --formats the model's weights are written in each format by the quantisers of the tests, which round to the nearest
code and calibrate nothing: a package that looks at activations does better.

The text is Python's own reference manual as every interpreter ships it (pydoc_data.topics): English prose the model was
not asked to memorise. Loss is nats per token over the same windows for every row: once with whole windows (quantised
weights are dequantised for that), once in steps of 16 tokens (they are not, on a CPU).
"""

from __future__ import annotations

import argparse
import platform
import pydoc_data.topics
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from petals.models.blocks.block import BlockSpan
from petals.models.client.local import LocalChain
from petals.models.source.checkpoint import Checkpoint, open_checkpoint
from petals.models.source.loading import load_span

ROWS = (("none", torch.float32), ("none", torch.bfloat16), ("int8", torch.float32), ("nf4", torch.float32))


def windows(tokenizer, count: int, length: int) -> Tensor:  # type: ignore[no-untyped-def]
    """(count, length) token ids of prose."""
    topics = pydoc_data.topics.topics
    prose = [p.replace("\n", " ") for key in sorted(topics) for p in topics[key].split("\n\n")]
    text = "\n".join(p for p in prose if len(p) > 200 and re.match(r"[A-Z]", p))
    ids = tokenizer(text[: count * length * 8], return_tensors="pt").input_ids[0]
    return ids[: count * length].reshape(count, length)


@torch.inference_mode()
def loss(full: PreTrainedModel, chain: LocalChain, ids: Tensor, step: int | None) -> float:
    """Nats per token."""
    hidden = full.model.embed_tokens(ids)
    if step is None:
        out = torch.cat([chain.forward(row) for row in hidden.split(1)])
    else:
        outs = []
        for row in hidden.split(1):
            with chain.open_session(batch_size=1, max_length=row.shape[1]) as session:
                outs.append(torch.cat([session.step(piece) for piece in row.split(step, dim=1)], 1))
        out = torch.cat(outs)
    total = 0.0
    for row, target in zip(out, ids, strict=True):
        logits = full.lm_head(full.model.norm(row))
        total += torch.nn.functional.cross_entropy(logits[:-1], target[1:]).item()
    return total / len(ids)


def decode_ms(chain: LocalChain, steps: int) -> float:
    """Median milliseconds of one step of one token through all blocks, after 16 tokens."""
    token = torch.randn(1, 1, chain.hidden_size)
    times = []
    with chain.open_session(batch_size=1, max_length=16 + steps + 1) as session:
        session.step(torch.randn(1, 16, chain.hidden_size))
        session.step(token)
        for _ in range(steps):
            began = time.perf_counter()
            session.step(token)
            times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def row(name: str, full: PreTrainedModel, span: BlockSpan, ids: Tensor) -> str:
    """Of the table."""
    chain, per_block = LocalChain(span), span.weight_bytes / len(span.blocks) / 1e6
    whole, stepped = loss(full, chain, ids, None), loss(full, chain, ids, 16)
    return f"| {name} | {per_block:.2f} | {whole:.4f} | {stepped:.4f} | {decode_ms(chain, 20):.0f} |"


def rows_of_formats(checkpoint: Checkpoint, room: Path) -> Iterator[tuple[str, Checkpoint]]:
    """The model in each format that a quantiser is at hand for."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.models.packers import CASES, quantise

    full = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    state = {name: tensor for name, tensor in full.state_dict().items() if name != "lm_head.weight"}
    for case in CASES:
        if case.id in _SAID_TWICE:
            continue
        quantise(full, case, room / case.id, state)
        yield f"{case.settings['quant_method']}: {case.holds}", open_checkpoint(room / case.id)
        shutil.rmtree(room / case.id)


_SAID_TWICE = ("fp8-small-blocks", "gptq-v2", "gptq-act-order", "compressed-fp8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="MODEL; default: SmolLM2-135M-Instruct")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--formats", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    checkpoint = open_checkpoint(args.model)
    full = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    ids = windows(checkpoint.tokenizer(), args.windows, args.length)
    print(
        f"{checkpoint.name}, {ids.numel():,} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        file=sys.stderr,
    )
    print("| blocks | MB per block | loss, whole windows | loss, 16 tokens a step | ms per token, all blocks |")
    print("|---|---|---|---|---|")
    if args.formats:
        with tempfile.TemporaryDirectory() as room:
            whole = load_span(checkpoint, range(checkpoint.num_blocks), dtype=torch.float32)
            print(row("as it is, in float32", full, whole, ids), flush=True)
            for name, packed in rows_of_formats(checkpoint, Path(room)):
                span = load_span(packed, range(packed.num_blocks), dtype=torch.float32)
                print(row(name, full, span, ids), flush=True)
        return
    for quant_type, dtype in ROWS:
        span = load_span(checkpoint, range(checkpoint.num_blocks), dtype=dtype, quant_type=quant_type)
        name = str(dtype).removeprefix("torch.") if quant_type == "none" else quant_type
        print(row(name, full, span, ids), flush=True)


if __name__ == "__main__":
    main()
