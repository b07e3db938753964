"""Try every decoder of the installed `transformers` as a tiny random model, and write what held into docs/models.md.

    python scripts/family_table.py                 # all of them, some minutes; writes the table
    python scripts/family_table.py llama mamba2    # only these; prints what happens, writes nothing

Each is saved as a checkpoint, served by two spans with their self-test, opened by a client, and compared with the
library's own model on the same weights: greedy tokens, a left-padded batch, beam search, sampling, steps of several
tokens with a roll-back, and gradients of the input.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from petals.models.client.causal_lm import load_causal_lm
from petals.models.client.local import LocalChain
from petals.models.client.miniature import lively_weights, miniature
from petals.models.source.checkpoint import open_checkpoint
from petals.models.source.loading import first_line, load_span

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- tried:", "<!-- end of tried -->"
SECONDS = 90
"""For one family at most."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one `model_type`."""

    model_type: str
    held: tuple[str, ...]
    failed: tuple[str, ...]
    refused: str | None = None
    """Why nothing was served."""


def decoder_types() -> list[str]:
    """All that `AutoModelForCausalLM` knows and that generate on their own."""
    known = []
    for model_type, config_class in CONFIG_MAPPING.items():
        if config_class in MODEL_FOR_CAUSAL_LM_MAPPING and not _is_other(config_class):
            known.append(model_type)
    return sorted(known)


_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"hidden_size": 64, "attn_layer_indices": [1], "num_hidden_layers": 4, "mamba_chunk_size": 16, **_MAMBA},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "mamba_chunk_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        **_MAMBA,
    },
    "falcon_h1": {"hidden_size": 64, "num_hidden_layers": 3, "mamba_d_ssm": 128, "mamba_chunk_size": 16, **_MAMBA},
    "mamba2": {
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 1,
    },
    "mamba": {"num_hidden_layers": 3, "hidden_size": 64},
    "falcon_mamba": {"num_hidden_layers": 3, "hidden_size": 64},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "conv", "full_attention", "conv"],
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
    },
    "kimi_linear": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    },
    "recurrent_gemma": {"lru_width": 64, "hidden_size": 64},
    "hunyuan_v1_dense": {"head_dim": 16},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "nemotron": {"num_key_value_heads": 2},
    "ministral": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "hunyuan_v1_moe": {"head_dim": 16},
}
"""Of families whose defaults are no model, or have no layer of some kind among the first."""


def _is_other(config_class: type[PretrainedConfig]) -> bool:
    """Whether it is a wrapper, whose text model has a type of its own, or an encoder-decoder."""
    try:
        config = config_class()
    except Exception:  # a configuration without defaults is tried, and its verdict says so
        return False
    return config.get_text_config(decoder=True) is not config or bool(getattr(config, "is_encoder_decoder", False))


def tiny_config(model_type: str) -> PretrainedConfig:
    """The family's default configuration, made small. Raises what the family raises."""
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {}))
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True  # BERT and what came of it
    return miniature(config)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True, slots=True)
class Pair:
    """The library's own model, made anew for each check, and ours."""

    whole: Callable[[], Any]
    client: Any
    chain: LocalChain


def make_pair(config: PretrainedConfig, directory: Path) -> Pair:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # numbers of float16, as published weights are: those are kept in half the bytes
    weights = {name: weight.half().float() for name, weight in lively_weights(model).items()}
    model.load_state_dict(weights, strict=False)
    model.eval()
    if model.config.is_encoder_decoder:
        raise ValueError("an encoder-decoder")
    ids = prompt(1)
    with torch.no_grad():
        model.generate(ids, max_new_tokens=2, do_sample=False)
    model.save_pretrained(directory)
    checkpoint = open_checkpoint(directory)
    count = checkpoint.num_blocks
    cut = count // 2
    spans = [load_span(checkpoint, blocks, dtype=torch.float32) for blocks in (range(cut), range(cut, count))]
    chain = LocalChain(spans)

    def whole() -> Any:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    return Pair(whole, load_causal_lm(checkpoint, chain, dtype=torch.float32), chain)


def prompt(rows: int, length: int = 9) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(5))


def says_the_same(pair: Pair, ids: Tensor, **settings: Any) -> bool:
    said = []
    for model in (pair.client, pair.whole()):
        torch.manual_seed(3)
        with torch.no_grad():
            said.append(model.generate(ids, max_new_tokens=7, **settings))
    return torch.equal(*said)


def greedy(pair: Pair) -> bool:
    return says_the_same(pair, prompt(1), do_sample=False)


def padded(pair: Pair) -> bool:
    ids = prompt(2)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    return says_the_same(pair, ids, attention_mask=mask, do_sample=False)


def beams(pair: Pair) -> bool:
    return says_the_same(pair, prompt(1), num_beams=3, do_sample=False)


def sampling(pair: Pair) -> bool:
    return says_the_same(pair, prompt(2), do_sample=True, temperature=0.8, top_k=20)


def steps(pair: Pair) -> bool:
    """What was said and taken back leaves no trace, and steps of several tokens give what one gives."""
    ids = prompt(1, 14)
    with torch.no_grad():
        whole = pair.whole().generate(ids, max_new_tokens=6, do_sample=False)
        with pair.client.inference_session(max_length=64) as session:
            pair.client.generate(ids[:, :5], max_new_tokens=6, do_sample=False)
            session.position = 3
            ours = pair.client.generate(ids[:, 3:], max_new_tokens=6, do_sample=False)
    return torch.equal(torch.cat([ids[:, 3:], ours[:, -6:]], 1), whole[:, 3:])


def gradients(pair: Pair) -> bool:
    """Of the input's embeddings."""
    found = []
    for model in (pair.client, pair.whole()):
        embeds = model.get_input_embeddings()(prompt(1)).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, use_cache=False).logits
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        found.append(torch.autograd.grad((logits * weight).sum(), embeds)[0])
    return bool((found[0] - found[1]).norm() <= 2e-3 * found[1].norm())


CHECKS: Sequence[Callable[[Pair], bool]] = (greedy, padded, beams, sampling, steps, gradients)


def judge(model_type: str) -> Verdict:
    """Try one."""
    held, failed = [], []
    with tempfile.TemporaryDirectory() as directory, at_most(SECONDS):
        try:
            pair = make_pair(tiny_config(model_type), Path(directory))
        except Exception as error:
            return Verdict(model_type, (), (), f"{type(error).__name__}: {first_line(error)}")
        for check in CHECKS:
            try:
                fine = check(pair)
            except Exception as error:
                print(f"    {model_type} {check.__name__}: {type(error).__name__}: {first_line(error)}")
                fine = False
            (held if fine else failed).append(check.__name__)
    return Verdict(model_type, tuple(held), tuple(failed))


def section(verdicts: Sequence[Verdict]) -> str:
    """Markdown: which are exact in every way, which in some, and why the others are not served."""
    exact = [each for each in verdicts if each.held and not each.failed]
    partly = [each for each in verdicts if each.failed]
    names = ", ".join(f"`{each.model_type}`" for each in exact)
    lines = [
        f"With transformers {transformers.__version__}, {len(exact)} of {len(verdicts)} are exact in all six ways:"
    ]
    lines += [names + ".", "", "| not in all ways | what differs, or why it is not served |", "|---|---|"]
    lines += [f"| `{each.model_type}` | differs in: {', '.join(each.failed)} |" for each in partly]
    lines += [f"| `{each.model_type}` | {_plain(each.refused)} |" for each in verdicts if each.refused]
    return "\n".join(lines)


def _plain(reason: str | None) -> str:
    """One line for a table: without the name of a temporary directory."""
    reason = re.sub(r"tmp\w+ ", "it ", (reason or "").replace("|", "/")).strip()
    reason = re.sub(r"^UnsupportedModel: it \([^)]*\) cannot be served( exactly)?: ", "", reason)
    return reason.removesuffix("; see docs/custom-model.md")[:160]


def with_section(document: str, verdicts: Sequence[Verdict]) -> str:
    """The document with the verdicts of today."""
    before, rest = document.split(BEGIN)
    comment, rest = rest.split("\n", 1)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{comment}\n{section(verdicts)}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE")
    wanted = parser.parse_args(arguments).types
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    verdicts = []
    for model_type in wanted or decoder_types():
        verdict = judge(model_type)
        verdicts.append(verdict)
        print(model_type, "held:", *verdict.held, "| failed:", *verdict.failed, "|", verdict.refused or "", flush=True)
    if not wanted:
        DOCUMENT.write_text(with_section(DOCUMENT.read_text(), verdicts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
