"""The formats that quantised checkpoints come in: which tensors make a matrix, and how to read it.

A scheme looks at the names of a block's tensors and the configuration's `quantization_config`. Tensors that belong to
one quantised weight become one `PackedSource`, under the name that the weight would have if it were not quantised;
so everything after it - renaming, fusing of experts - is what `transformers` does with a plain checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from petals.models.errors import CheckpointError
from petals.models.kernels.ggml import GGML_TYPES
from petals.models.kernels.packed import E2M1, INTEGERS, Fp8Matrix, GgmlMatrix, Int8Matrix, NibbleMatrix, Packed

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a checkpoint's tensors by name."""
Settings = Mapping[str, Any]
"""An entry `quantization_config`."""
Parts = Mapping[str, Tensor]
"""The tensors of one weight, by what they are."""


@dataclass(frozen=True, slots=True)
class PackedSource:
    """One quantised weight of a checkpoint, not read."""

    name: str
    """As it would be called if it were not quantised."""
    shape: tuple[int, ...]
    """(out, in), or (experts, out, in)."""
    parts: Mapping[str, str]
    """Names of its tensors, by what they are to the format."""
    build: Callable[[Parts], Packed]
    """Makes the matrix; of experts, one of them."""
    flipped: bool = False
    """Experts only: the model has them as (experts, in, out)."""
    shared: frozenset[str] = field(default_factory=frozenset)
    """Parts that all experts share."""


@dataclass(frozen=True, slots=True)
class Format:
    """A row of the table of formats."""

    method: str
    """`quant_method`, as in config.json."""
    title: str
    """For people."""
    suffixes: tuple[str, ...]
    """What the names of a quantised weight's main tensors end with."""
    gather: Callable[[str, Mapping[str, str], Shapes, Settings], PackedSource | None]
    """Makes a source of the tensors whose names begin with the stem (given first), by their suffixes; None: the tensor
    is a plain one."""


class Scheme:
    """How the weights of one checkpoint are quantised."""

    def __init__(self, name: str, settings: Settings) -> None:
        """`name`: of the checkpoint, for messages. Raises CheckpointError for a format that is not supported."""
        method = str(settings.get("quant_method") or ("compressed-tensors" if "config_groups" in settings else ""))
        method = "bitsandbytes" if method.startswith("bitsandbytes") else method
        known = {each.method: each for each in FORMATS}
        if method not in known:
            raise CheckpointError(
                f"{name} is quantised as {method or 'nothing known'!r}; supported are {', '.join(known)}. Use the "
                "model's own bfloat16 checkpoint with --quant_type, or one in a supported format"
            )
        self.format = known[method]
        self._name = name
        self._settings = settings
        if check := _CHECKS.get(method):
            check(name, settings)

    def sources(self, names: Iterable[str], shapes: Shapes) -> tuple[dict[str, PackedSource], list[str]]:
        """The quantised weights among these tensors, by the names that they would have; and the other tensors.

        Raises: CheckpointError when a weight lacks a part, or parts do not fit each other.
        """
        families: dict[str, dict[str, str]] = {}
        for name in names:
            for suffix in (*_SUFFIXES, *_GGUF_SUFFIXES):
                if name.endswith(suffix):
                    families.setdefault(name.removesuffix(suffix), {})[suffix] = name
                    break
        sources, used = dict[str, PackedSource](), set[str]()
        for stem, members in families.items():
            if not any(suffix in members for suffix in self.format.suffixes):
                continue
            try:
                source = self.format.gather(stem, members, shapes, self._settings)
            except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
                lacks = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                raise CheckpointError(f"{self._name}: {stem} is no {self.format.title} weight: {lacks}") from None
            if source is not None:
                sources[source.name] = source
                used.update(members[suffix] for suffix in members if suffix != ".bias")
        return sources, [name for name in names if name not in used]


_SUFFIXES = (
    ".weight_scale_inv",
    ".weight_scale_2",
    ".weight_scale",
    ".weight_packed",
    ".weight_shape",
    ".weight_zero_point",
    ".weight_g_idx",
    ".weight_format",
    ".weight.absmax",
    ".weight.quant_map",
    ".weight.nested_absmax",
    ".weight.nested_quant_map",
    ".weight.quant_state.bitsandbytes__nf4",
    ".weight.quant_state.bitsandbytes__fp4",
    ".input_scale",
    ".activation_scale",
    ".SCB",
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight",
    "_scale_inv",
    "_blocks",
    "_scales",
)
"""Longer ones first, where one ends as another."""


def _blocks_of(width: int, count: int, what: str) -> int:
    """The size of the blocks, all of them equal, that a number of scales per `width` weights means."""
    if count < 1 or width % count:
        raise ValueError(f"{count} {what} for {width} weights")
    return width // count


# FP8


_PIECE_ROWS = 64
"""Of a matrix that are looked at at a time: a copy of it leaves a hole that the next matrix does not fit into."""


def _fp8(stem: str, members: Mapping[str, str], shapes: Shapes, settings: Settings) -> PackedSource | None:
    """Blocks (`weight_scale_inv`), rows or whole matrices (`weight_scale`) of e4m3 codes."""
    weight, fused = (members[".weight"], False) if ".weight" in members else (stem, True)
    scale = next((members[s] for s in (".weight_scale_inv", ".weight_scale", "_scale_inv") if s in members), None)
    if scale is None:
        return None
    shape, scales = shapes[weight], shapes[scale]
    rows, width = shape[-2:]
    block = _fp8_block(rows, width, scales[1:] if len(shape) == 3 and len(scales) == 3 else scales, settings)

    def build(parts: Parts) -> Packed:
        codes, scale = parts["codes"], parts["scale"].float()
        if codes.dtype != torch.float8_e4m3fn:
            raise CheckpointError(f"{stem} is stored as {codes.dtype}, not as float8_e4m3fn")
        if any(bool(((piece & 127) == 127).any()) for piece in torch.split(codes.view(torch.uint8), _PIECE_ROWS)):
            raise CheckpointError(f"{stem} has weights that are no numbers")
        return Fp8Matrix(codes, scale.reshape(-(-rows // block[0]), -(-width // block[1])), block)

    name = stem if fused else weight
    return PackedSource(name, shape, {"codes": weight, "scale": scale}, build)


def _fp8_block(rows: int, width: int, scales: tuple[int, ...], settings: Settings) -> tuple[int, int]:
    """Rows and columns that share a scale. What the configuration says, not what sizes seem to imply: 576 rows have
    five scales of 128 rows, and 192 have two."""
    count = 1
    for size in scales:
        count *= size
    if count == 1:
        return rows, width
    if scales in ((rows,), (rows, 1)):
        return 1, width
    block = settings.get("weight_block_size") or _group_of(settings).get("block_structure")
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ValueError(f"scales of shape {list(scales)}, but no weight_block_size in its config.json")
    expected = (-(-rows // block[0]), -(-width // block[1]))
    if tuple(scales) != expected:
        raise ValueError(f"scales of shape {list(scales)}; {rows} x {width} in blocks of {list(block)} have {expected}")
    return block[0], block[1]


def _check_fp8(name: str, settings: Settings) -> None:
    form = settings.get("fmt", "e4m3")
    if form != "e4m3":
        raise CheckpointError(f"{name} is FP8 in {form}; only e4m3 is supported")


# MXFP4


def _mxfp4(stem: str, members: Mapping[str, str], shapes: Shapes, settings: Settings) -> PackedSource | None:
    """Experts of gpt-oss: (experts, out, groups, 16) bytes, (experts, out, groups) exponents."""
    blocks, scales = members["_blocks"], members["_scales"]
    experts, out, groups, half = shapes[blocks]
    if half != 16 or shapes[scales] != (experts, out, groups):
        raise ValueError(f"blocks {list(shapes[blocks])} and scales {list(shapes[scales])}")

    def build(parts: Parts) -> Packed:
        return NibbleMatrix(parts["codes"].reshape(out, -1), parts["scale"], torch.tensor(E2M1), group=32)

    return PackedSource(stem, (experts, out, 32 * groups), {"codes": blocks, "scale": scales}, build, flipped=True)


# GPTQ and AWQ


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """(rows, words) int32 -> (rows, words * 32 / bits) uint8, low bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    fields = (words[..., None] >> shifts) & ((1 << bits) - 1)
    return fields.to(torch.uint8).flatten(-2)


def _in_pairs(codes: Tensor) -> Tensor:
    """(out, in) of 4-bit codes -> (out, in / 2), the first in the low bits."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _integers(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, order: Tensor | None = None
) -> Packed:
    """codes (out, in) uint8 below 2**bits."""
    if bits == 8:
        return Int8Matrix(codes, scale, zero=zero, group=group, order=order)
    return NibbleMatrix(_in_pairs(codes), scale, torch.tensor(INTEGERS), zero=zero, group=group, order=order)


def _gptq(stem: str, members: Mapping[str, str], shapes: Shapes, settings: Settings) -> PackedSource | None:
    bits = int(settings["bits"])
    words, out = shapes[members[".qweight"]]
    width = words * 32 // bits
    groups = shapes[members[".scales"]][0]
    group = _blocks_of(width, groups, "groups")
    parts = {"codes": members[".qweight"], "scale": members[".scales"], "zero": members[".qzeros"]}
    if ".g_idx" in members:
        parts["order"] = members[".g_idx"]
    first_version = settings.get("checkpoint_format", "gptq") != "gptq_v2"

    def build(parts: Parts) -> Packed:
        codes = _transposed_fields(parts["codes"], bits)
        zero = _unpacked(parts["zero"], bits).t().contiguous()
        if first_version:  # which stores one less than the zero
            zero = (zero + 1) & ((1 << bits) - 1)
        order = _act_order(parts.get("order"), width, group)
        codes = codes if order is None else codes[:, order]
        return _integers(codes, parts["scale"].t().contiguous(), zero, bits, group, order)

    return PackedSource(f"{stem}.weight", (out, width), parts, build)


def _transposed_fields(words: Tensor, bits: int) -> Tensor:
    """(in * bits / 32, out) int32, fields along the inputs -> (out, in) uint8; a piece at a time."""
    pieces = torch.split(words, 1024, 1)
    return torch.cat([_unpacked(piece.t().contiguous(), bits) for piece in pieces])


def _act_order(indices: Tensor | None, width: int, group: int) -> Tensor | None:
    """The inputs in the order of their groups; None: that is their own order."""
    if indices is None:
        return None
    if indices.shape != (width,) or not torch.equal(torch.bincount(indices), torch.full((width // group,), group)):
        raise CheckpointError("g_idx does not deal the inputs to equal groups")
    order = torch.argsort(indices, stable=True)
    return None if torch.equal(order, torch.arange(width)) else order


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the fields of eight neighbours are."""


def _awq(stem: str, members: Mapping[str, str], shapes: Shapes, settings: Settings) -> PackedSource | None:
    width, words = shapes[members[".qweight"]]
    out = words * 8
    group = _blocks_of(width, shapes[members[".scales"]][0], "groups")
    parts = {"codes": members[".qweight"], "scale": members[".scales"], "zero": members[".qzeros"]}

    def in_order(words: Tensor) -> Tensor:
        fields = _unpacked(words, 4).view(len(words), -1, 8)
        return fields[:, :, list(_AWQ_ORDER)].flatten(1)

    def build(parts: Parts) -> Packed:
        zero = in_order(parts["zero"]).t().contiguous()
        pieces = [in_order(piece).t().contiguous() for piece in torch.split(parts["codes"], 128, 1)]
        return _integers(torch.cat(pieces), parts["scale"].t().contiguous(), zero, 4, group)

    return PackedSource(f"{stem}.weight", (out, width), parts, build)


def _check_bits(name: str, settings: Settings) -> None:
    bits, method = settings.get("bits", settings.get("w_bit", 4)), settings["quant_method"]
    if bits not in ((4, 8) if method == "gptq" else (4,)):
        raise CheckpointError(
            f"{name} is {method} in {bits} bits; supported are {'4 and 8' if method == 'gptq' else 4}"
        )
    version = str(settings.get("version", "gemm")).lower()
    if method == "awq" and version != "gemm":
        raise CheckpointError(f"{name} is AWQ in the layout {version}; only gemm is supported")


# compressed-tensors


def _group_of(settings: Settings) -> Settings:
    groups = settings.get("config_groups")
    first: Any = next(iter(groups.values()), {}) if isinstance(groups, dict) else {}
    weights = first.get("weights") if isinstance(first, dict) else None
    return weights if isinstance(weights, dict) else {}


def _compressed(stem: str, members: Mapping[str, str], shapes: Shapes, settings: Settings) -> PackedSource | None:
    if ".weight_packed" in members:
        return _compressed_int4(stem, members, shapes, settings)
    if ".weight_scale" not in members or ".weight" not in members:
        return None
    if _group_of(settings).get("type") == "float":
        return _fp8(stem, members, shapes, settings)
    rows, width = shapes[members[".weight"]]
    scales = shapes[members[".weight_scale"]]
    groups = scales[1] if len(scales) == 2 else 1
    group = _blocks_of(width, groups, "groups")
    parts = {"codes": members[".weight"], "scale": members[".weight_scale"]}
    if ".weight_zero_point" in members:
        parts["zero"] = members[".weight_zero_point"]

    def build(parts: Parts) -> Packed:
        scale, zero = (
            None if part is None else part.reshape(-1, groups).expand(rows, groups).contiguous()
            for part in (parts["scale"], parts.get("zero"))
        )
        assert scale is not None
        return Int8Matrix(parts["codes"], scale, zero=zero, group=group)

    return PackedSource(members[".weight"], (rows, width), parts, build)


def _compressed_int4(stem: str, members: Mapping[str, str], shapes: Shapes, settings: Settings) -> PackedSource | None:
    """`pack-quantized`: offset binary, eight to a word along a row."""
    bits = int(_group_of(settings)["num_bits"])
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits; 4 and 8 are supported")
    rows, words = shapes[members[".weight_packed"]]
    width = words * 32 // bits
    groups = shapes[members[".weight_scale"]][1]
    group = _blocks_of(width, groups, "groups")
    parts = {"codes": members[".weight_packed"], "scale": members[".weight_scale"]}
    for part, suffix in (("zero", ".weight_zero_point"), ("order", ".weight_g_idx")):
        if suffix in members:
            parts[part] = members[suffix]

    def build(parts: Parts) -> Packed:
        codes = _unpacked(parts["codes"], bits)
        zero = torch.full(parts["scale"].shape, 1 << (bits - 1), dtype=torch.uint8)
        if "zero" in parts:
            zero = _unpacked(parts["zero"].t().contiguous(), bits).t()[:rows].contiguous()
        order = _act_order(parts.get("order"), width, group)
        codes = codes if order is None else codes[:, order]
        return _integers(codes, parts["scale"], zero, bits, group, order)

    return PackedSource(f"{stem}.weight", (rows, width), parts, build)


_COMPRESSED = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "dense")


def _check_compressed(name: str, settings: Settings) -> None:
    form = settings.get("format")
    if form not in _COMPRESSED:
        raise CheckpointError(f"{name} is compressed-tensors {form!r}; supported are {', '.join(_COMPRESSED)}")
    groups = settings.get("config_groups")
    kinds = {json.dumps(group.get("weights"), sort_keys=True) for group in groups.values()} if groups else set()
    if len(kinds) > 1:
        raise CheckpointError(f"{name} has {len(kinds)} kinds of quantised weights; one is supported")


# bitsandbytes


def _bitsandbytes(stem: str, members: Mapping[str, str], shapes: Shapes, settings: Settings) -> PackedSource | None:
    if ".SCB" in members:
        rows, width = shapes[members[".weight"]]

        def build8(parts: Parts) -> Packed:
            return Int8Matrix(parts["codes"], parts["scale"].float().reshape(rows, 1) / 127, group=width)

        return PackedSource(
            members[".weight"], (rows, width), {"codes": members[".weight"], "scale": members[".SCB"]}, build8
        )
    kind = next((suffix for suffix in members if "quant_state" in suffix), None)
    if kind is None or ".weight.absmax" not in members:
        return None
    parts = {"codes": members[".weight"], "state": members[kind], "table": members[".weight.quant_map"]}
    parts["scale"] = members[".weight.absmax"]
    for part, suffix in (("nested", ".weight.nested_absmax"), ("nested_table", ".weight.nested_quant_map")):
        if suffix in members:
            parts[part] = members[suffix]
    # The shape is in the state, a tensor of JSON: read when the block is.
    return PackedSource(members[".weight"], (), parts, lambda parts: _four_bits(stem, parts))


def _four_bits(stem: str, parts: Parts) -> Packed:
    """nf4 or fp4: blocks of 64 codes along the flattened matrix, the first in the high bits."""
    state = json.loads(bytes(parts["state"].tolist()))
    rows, width = (int(size) for size in state["shape"])
    size = int(state["blocksize"])
    if width % size:
        raise CheckpointError(f"{stem} has rows of {width} weights, which are no multiple of its blocks of {size}")
    scale = parts["scale"]
    if "nested" in parts:
        step = int(state["nested_blocksize"])
        outer = parts["nested"].float().repeat_interleave(step)[: len(scale)]
        scale = parts["nested_table"].float()[scale.long()] * outer + float(state["nested_offset"])
    codes = parts["codes"].reshape(rows, width // 2)
    codes = (codes >> 4) | (codes << 4)
    return NibbleMatrix(codes, scale.float().view(rows, -1), parts["table"].float(), group=size)


def shape_of_four_bits(state: Tensor) -> tuple[int, ...]:
    """Of a bitsandbytes weight, whose tensor is a flat one. Raises ValueError, LookupError, TypeError."""
    return tuple(int(size) for size in json.loads(bytes(state.tolist()))["shape"])


# GGUF


def _gguf(stem: str, members: Mapping[str, str], shapes: Shapes, settings: Settings) -> PackedSource | None:
    """Blocks of a GGUF file (gguf_file.py), whose name says their type."""
    suffix = next(suffix for suffix in members if suffix.startswith(".weight.ggml_"))
    turned = suffix.endswith("_turned")
    kind = suffix.removeprefix(".weight.ggml_").removesuffix("_turned")
    rows, nbytes = shapes[members[suffix]]
    weights, per_block = GGML_TYPES[kind]
    heads = int(settings["heads"] if stem.endswith("q_proj") else settings["key_heads"])
    if nbytes % per_block or (turned and rows % (2 * heads)):
        raise ValueError(f"{rows} rows of {nbytes} bytes")

    def build(parts: Parts) -> Packed:
        blocks = GgmlMatrix(parts["codes"], kind)
        if not turned:
            return blocks
        return blocks.take(torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1))

    shape = (rows, nbytes // per_block * weights)
    return PackedSource(f"{stem}.weight", shape, {"codes": members[suffix]}, build)


_GGUF_SUFFIXES = tuple(f".weight.ggml_{kind}{turned}" for kind in GGML_TYPES for turned in ("_turned", ""))

FORMATS: Sequence[Format] = (
    Format("fp8", "FP8", (".weight_scale_inv", ".weight_scale", "_scale_inv"), _fp8),
    Format("fbgemm_fp8", "FBGEMM FP8", (".weight_scale",), _fp8),
    Format("mxfp4", "MXFP4", ("_blocks",), _mxfp4),
    Format("gptq", "GPTQ", (".qweight",), _gptq),
    Format("awq", "AWQ", (".qweight",), _awq),
    Format("compressed-tensors", "compressed-tensors", (".weight_packed", ".weight_scale"), _compressed),
    Format("bitsandbytes", "bitsandbytes", (".SCB", ".weight.absmax"), _bitsandbytes),
    Format("gguf", "GGUF", _GGUF_SUFFIXES, _gguf),
)
_CHECKS: Mapping[str, Callable[[str, Settings], None]] = {
    "fp8": _check_fp8,
    "gptq": _check_bits,
    "awq": _check_bits,
    "compressed-tensors": _check_compressed,
}


def scheme_of(name: str, config: Mapping[str, Any]) -> Scheme | None:
    """How a checkpoint with this config.json is quantised; None: it is not.

    Raises: CheckpointError for a format that is not supported.
    """
    texts = [config.get("text_config")] if isinstance(config.get("text_config"), dict) else []
    for each in (config, *texts):
        settings = each.get("quantization_config") or each.get("compression_config") if each else None
        if isinstance(settings, dict):
            return Scheme(name, settings)
        if settings is not None:
            raise CheckpointError(f"{name} has a quantization_config that is no JSON object")
    return None
