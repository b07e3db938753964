"""GGUF files that are served as they are: blocks of weights are read straight from the file, and stay in its bits.

To everything else such a file looks like a checkpoint of safetensors: a tensor has the name that the model's family has
for it, with the way it is stored at the end (`model.layers.3.mlp.up_proj.weight.ggml_Q4_K`), bytes, and a place. The
format's gatherer (formats.py) makes matrices of them, also where another peer has fetched them as safetensors. Beside
the file, in the cache, lie only a configuration and a tokenizer.

Names and layouts are known for the architectures below. Other files, and files with other types, are converted.

- Llama's queries and keys have their rows in another order, in which rotary embeddings turn neighbours instead of
  halves. The names of these tensors end with `_turned`.
- Experts are one tensor; each of its matrices becomes a tensor of its own, as in the family's checkpoints.
- `rope_freqs` are what Llama 3's rotary embedding is scaled by; the configuration is made to give the same, or the file
  is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from petals.models.errors import CheckpointError
from petals.models.kernels.ggml import GGML_TYPES
from petals.models.source.checkpoint import Checkpoint
from petals.models.source.disk import write_json
from petals.models.source.gguf_header import GgufHeader, GgufTensor, check_model, read_gguf_header
from petals.models.source.shard import TensorEntry

_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_ROUTER = {"ffn_gate_inp": "mlp.gate"}
_OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True, slots=True)
class _Architecture:
    names: Mapping[str, str]
    """Of a block's modules, by ggml's."""
    turned: tuple[str, ...] = ()
    """Modules whose rows are in another order."""


ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture(_ATTENTION | _MLP, ("attn_q", "attn_k")),
    "qwen2": _Architecture(_ATTENTION | _MLP),
    "qwen3": _Architecture(_ATTENTION | _MLP),
    "qwen3moe": _Architecture(_ATTENTION | _ROUTER),
}
"""By `general.architecture`."""

_SPLIT = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor and the file that it is in."""

    file: str
    tensor: GgufTensor


class GgufFiles:
    """A GGUF file, or all parts of a split one."""

    def __init__(self, path: Path) -> None:
        """`path`: the file, or any part. Raises CheckpointError: a part is missing, or the header makes no sense."""
        self.paths = parts_of(path)
        headers = [read_gguf_header(each) for each in self.paths]
        self.values = headers[0].values
        self.tensors: dict[str, _Placed] = {}
        for each, header in zip(self.paths, headers, strict=True):
            for name, tensor in header.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"{each} has tensor {name}, which an earlier part has, too")
                self.tensors[name] = _Placed(each.name, tensor)
        try:
            check_model(GgufHeader(self.values, {name: placed.tensor for name, placed in self.tensors.items()}))
        except ValueError as error:
            raise CheckpointError(f"{path} is no usable GGUF file: {error}") from None
        self.blocks = self._number("block_count")
        self.heads = self._number("attention.head_count")
        self.key_heads = self._number("attention.head_count_kv") or self.heads

    @property
    def direct(self) -> bool:
        """Whether it can be served as it is."""
        found = self._architecture
        if found is None or not self.heads or not self.blocks:
            return False
        quantised = False
        for name, placed in self.tensors.items():
            kind = placed.tensor.kind
            stem = name.split(".")[2] if name.startswith("blk.") and name.count(".") >= 3 else ""
            known = stem in found.names or (stem in _EXPERTS and _ROUTER.items() <= found.names.items())
            if not known and name.rpartition(".")[0] not in _OTHERS and name != "rope_freqs.weight":
                return False
            if kind not in GGML_TYPES and (kind not in _PLAIN or stem in found.turned):
                return False
            quantised |= kind in GGML_TYPES
        return quantised

    @property
    def _architecture(self) -> _Architecture | None:
        return ARCHITECTURES.get(str(self.values.get("general.architecture")))

    def _number(self, key: str) -> int:
        number = self.values.get(f"{self.values.get('general.architecture')}.{key}")
        return number if isinstance(number, int) else 0

    def entries(self) -> dict[str, tuple[str, TensorEntry]]:
        """File and entry of every tensor, by the name that it has as a checkpoint's."""
        found = self._architecture
        assert found is not None
        made: dict[str, tuple[str, TensorEntry]] = {}
        for name, placed in self.tensors.items():
            for entry in _entries(name, placed.tensor, found):
                made[entry.name] = placed.file, entry
        for needed in ("model.embed_tokens.weight", "model.norm.weight"):
            if not any(name.startswith(needed) for name in made):
                raise CheckpointError(f"{self.paths[0]} lacks {needed}; fetch it again")
        return made

    def settings(self) -> dict[str, Any]:
        """The `quantization_config` of the checkpoint that it stands for."""
        return {"quant_method": "gguf", "heads": self.heads, "key_heads": self.key_heads}

    def widths(self) -> dict[str, int]:
        """Entries of the configuration that transformers 5.23 does not take from the file."""
        entries = {"head_dim": "attention.key_length", "moe_intermediate_size": "expert_feed_forward_length"}
        return {name: number for name, key in entries.items() if (number := self._number(key))}

    def rope_frequencies(self) -> torch.Tensor | None:
        """What Llama 3's rotary frequencies are divided by, float32; None: nothing."""
        placed = self.tensors.get("rope_freqs.weight")
        if placed is None or placed.tensor.kind != "F32":
            return None
        with (self.paths[0].parent / placed.file).open("rb") as file:
            file.seek(placed.tensor.offset)
            return torch.frombuffer(bytearray(file.read(placed.tensor.nbytes)), dtype=torch.float32)


def parts_of(path: Path) -> list[Path]:
    """The file, or the parts of the split file that it is one of, in order. Raises CheckpointError: one is missing."""
    found = _SPLIT.match(path.name)
    if found is None:
        return [path]
    total = int(found[3])
    parts = [path.with_name(f"{found[1]}-{part:05d}-of-{found[3]}.gguf") for part in range(1, total + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not 0 < total <= 1000:
        raise CheckpointError(
            f"{path.name} is one of {total} parts, and {len(missing)} are not beside it: {', '.join(missing[:3])}"
        )
    return parts


def _entries(name: str, tensor: GgufTensor, found: _Architecture) -> Iterator[TensorEntry]:
    """A tensor, or the matrices of one that holds experts."""
    stem, _, leaf = name.rpartition(".")
    if stem in _OTHERS:
        yield _entry(f"{_OTHERS[stem]}.{leaf}", tensor)
    elif name.startswith("blk."):
        _, block, module = stem.split(".", 2)
        if module in _EXPERTS:
            count = tensor.shape[0]
            nbytes = tensor.nbytes // count
            for expert in range(count):
                one = GgufTensor(tensor.kind, tensor.shape[1:], tensor.offset + expert * nbytes, nbytes)
                yield _entry(f"model.layers.{block}.mlp.experts.{expert}.{_EXPERTS[module]}.{leaf}", one)
        else:
            turned = "_turned" if module in found.turned and leaf == "weight" else ""
            yield _entry(f"model.layers.{block}.{found.names[module]}.{leaf}", tensor, turned)


def _entry(name: str, tensor: GgufTensor, turned: str = "") -> TensorEntry:
    if tensor.kind in _PLAIN:
        return TensorEntry(name, _PLAIN[tensor.kind], tensor.shape, tensor.offset, tensor.nbytes)
    rows = math.prod(tensor.shape[:-1])
    shape = (rows, tensor.nbytes // rows)
    return TensorEntry(f"{name}.ggml_{tensor.kind}{turned}", "U8", shape, tensor.offset, tensor.nbytes)


class GgufCheckpoint(Checkpoint):
    """A checkpoint whose tensors are in GGUF files."""

    def __init__(self, name: str, directory: Path, files: GgufFiles, identity: str) -> None:
        """`directory`: of its configuration and tokenizer, which `describe` wrote."""
        self._files = files
        super().__init__(name, directory, identity=identity)
        if self.num_blocks != files.blocks:
            raise CheckpointError(f"{name} has {files.blocks} blocks, its configuration {self.num_blocks}")

    @cached_property
    def _entries(self) -> dict[str, tuple[str, TensorEntry]]:
        return self._files.entries()

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        return {name: file for name, (file, _) in self._entries.items()}

    def _header(self, file: str) -> dict[str, TensorEntry]:
        return {name: entry for name, (home, entry) in self._entries.items() if home == file}

    def _entry(self, file: str, name: str) -> TensorEntry:
        return self._entries[name][1]

    def _path_of(self, file: str) -> Path:
        return self._files.paths[0].parent / file


def describe(files: GgufFiles, room: Path, library_errors: Callable[[Path], Any]) -> None:
    """Write the configuration and the tokenizer that a GGUF file holds into the folder `room`.

    Raises: CheckpointError: transformers cannot read it.
    """
    from transformers import AutoConfig, AutoTokenizer

    first = files.paths[0]
    with library_errors(first):
        config = AutoConfig.from_pretrained(first.parent, gguf_file=first.name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(first.parent, gguf_file=first.name, trust_remote_code=False)
        config.tie_word_embeddings = "output.weight" not in files.tensors
        config.save_pretrained(room)
        tokenizer.save_pretrained(room)
    path = room / "config.json"
    written = json.loads(path.read_text())
    written.update(quantization_config=files.settings(), dtype="float32", **files.widths(), **_rope(files, written))
    write_json(path, written)


_LLAMA3 = ((8.0, 8192), (32.0, 8192), (16.0, 8192), (4.0, 8192))
"""Factors, and context lengths before, of the published models: 3.1 and 3.3, 3.2."""


def _rope(files: GgufFiles, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entry that makes the library's rotary embedding give the frequencies of the file."""
    wanted = files.rope_frequencies()
    if wanted is None:
        return {}
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    plain = theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    for factor, before in _LLAMA3:
        length = 2 * math.pi / plain
        smooth = ((before / length - 1) / 3).clamp(0, 1)  # from low_freq_factor 1 to high_freq_factor 4
        divided = 1 / ((1 - smooth) / factor + smooth)
        if divided.shape == wanted.shape and torch.allclose(divided, wanted, rtol=1e-3):
            scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            scaling |= {"original_max_position_embeddings": before, "rope_theta": theta}
            return {"rope_parameters": {"rope_type": "llama3", **scaling}, "rope_scaling": None}
    raise CheckpointError(f"{files.paths[0]} scales its rotary embedding (rope_freqs) in a way that is not known")
