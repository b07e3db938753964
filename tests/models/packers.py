"""Quantisers for tests, written from each format's specification: weights in, tensors as a checkpoint has them out.

The dequantised weights that come with them are the truth: they are made from the integers directly, not by unpacking.
Where a package has the format (bitsandbytes, gguf, transformers' MXFP4), the package makes or checks them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

Packed = tuple[dict[str, Tensor], Tensor]
"""Tensors by what is put behind the weight's stem (`model.layers.0.mlp.up_proj`), and the dequantised weight."""


@dataclass(frozen=True)
class FormatCase:
    """One way to write a checkpoint."""

    id: str
    settings: Mapping[str, Any] = field(repr=False)
    """Its `quantization_config`."""
    pack: Callable[[Tensor], Packed] = field(repr=False)
    """weight (out, in) float32."""
    holds: str = ""
    """For the documentation: what is in the file."""


def fp8_blocks(weight: Tensor, block: tuple[int, int] = (128, 128)) -> Packed:
    """DeepSeek's: e4m3 with a float32 scale for each block; the last ones may be smaller."""
    out, width = weight.shape
    rows, columns = -(-out // block[0]), -(-width // block[1])
    scale = torch.empty(rows, columns)
    codes = torch.empty(out, width, dtype=torch.float8_e4m3fn)
    wide = torch.empty(out, width)
    for i in range(rows):
        for j in range(columns):
            here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = weight[here].abs().max() / 448
            codes[here] = (weight[here] / scale[i, j]).to(torch.float8_e4m3fn)
            wide[here] = codes[here].float() * scale[i, j]
    return {".weight": codes, ".weight_scale_inv": scale}, wide


def fp8_rows(weight: Tensor) -> Packed:
    """A scale for each row, as FBGEMM and compressed-tensors have it."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scale}, codes.float() * scale


def fp8_whole(weight: Tensor) -> Packed:
    """One scale for a matrix, in bfloat16."""
    scale = (weight.abs().max() / 448).bfloat16()
    codes = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale": scale.reshape(1)}, codes.float() * scale.float()


def _affine(weight: Tensor, group: int, bits: int, *, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (out, in), float16 scales and zeros (out, groups), and what they stand for."""
    out, width = weight.shape
    cut = weight.view(out, -1, group)
    top = (1 << bits) - 1
    low, high = cut.amin(-1).clamp(max=0), cut.amax(-1).clamp(min=0)
    scale = (2 * cut.abs().amax(-1) / top if symmetric else (high - low) / top).half()
    zero = torch.full_like(low, (top + 1) / 2) if symmetric else (-low / scale.float()).round().clamp(1, top)
    codes = (cut / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
    wide = (codes - zero[..., None]) * scale.float()[..., None]
    return codes.view(out, width).to(torch.int64), scale, zero.to(torch.int64), wide.view(out, width)


def _words(fields: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """(rows, n) -> (rows, n * bits / 32) int32; `order`: which field of a run is put where, lowest bits first."""
    per_word = 32 // bits
    runs = fields.view(len(fields), -1, per_word)
    if order is not None:
        runs = runs[:, :, list(order)]
    words = (runs << (torch.arange(per_word) * bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def gptq(weight: Tensor, group: int = 32, bits: int = 4, *, shuffled: bool = False, version: int = 1) -> Packed:
    """GPTQ's: words along the inputs; zeros less one in the first version; `shuffled`: groups of inputs that are not
    neighbours ("act order")."""
    width = weight.shape[1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(9)) if shuffled else torch.arange(width)
    codes, scale, zero, wide = _affine(weight[:, order].contiguous(), group, bits)
    back = torch.argsort(order)
    tensors = {
        ".qweight": _words(codes[:, back], bits).t().contiguous(),
        ".qzeros": _words((zero - int(version == 1)).t().contiguous(), bits),
        ".scales": scale.t().contiguous(),
        ".g_idx": (back // group).to(torch.int32),
    }
    return tensors, wide[:, back]


def awq(weight: Tensor) -> Packed:
    """AutoAWQ's gemm layout: words along the outputs, in an order of their own."""
    codes, scale, zero, wide = _affine(weight, 32, 4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        ".qweight": _words(codes.t().contiguous(), 4, order),
        ".qzeros": _words(zero.t().contiguous(), 4, order),
        ".scales": scale.t().contiguous(),
    }
    return tensors, wide


def compressed_int4(weight: Tensor, *, symmetric: bool = True) -> Packed:
    """compressed-tensors' pack-quantized."""
    codes, scale, zero, wide = _affine(weight, 32, 4, symmetric=symmetric)
    tensors = {
        ".weight_packed": _words(codes, 4),
        ".weight_scale": scale,
        ".weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors[".weight_zero_point"] = _words(zero.t().contiguous(), 4).t().contiguous()
    return tensors, wide


def compressed_int8(weight: Tensor) -> Packed:
    """int-quantized, a scale for each row."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return {".weight": codes, ".weight_scale": scale}, codes.float() * scale.float()


def bitsandbytes_nf4(weight: Tensor, *, nested: bool = True, kind: str = "nf4") -> Packed:
    """What `save_pretrained` writes after bitsandbytes quantised."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    entries = state.as_dict(packed=True)
    return {".weight": codes, **{f".weight.{name}": value for name, value in entries.items()}}, dequantize_4bit(
        codes, state
    ).float()


def bitsandbytes_int8(weight: Tensor) -> Packed:
    """LLM.int8()."""
    scale = weight.abs().amax(1)
    codes = (weight * 127 / scale[:, None]).round().to(torch.int8)
    return {".weight": codes, ".SCB": scale}, codes.float() * scale[:, None] / 127


def _weights(**settings: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": settings}}}


CASES: tuple[FormatCase, ...] = (
    FormatCase(
        "fp8-blocks",
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        fp8_blocks,
        holds="e4m3, a scale for each 128 x 128 (DeepSeek, Qwen3, GLM)",
    ),
    FormatCase(
        "fp8-small-blocks",
        {"quant_method": "fp8", "weight_block_size": [48, 80]},
        lambda weight: fp8_blocks(weight, (48, 80)),
        holds="e4m3, blocks of any size, the last ones cut off",
    ),
    FormatCase("fp8-rows", {"quant_method": "fbgemm_fp8"}, fp8_rows, holds="e4m3, a scale for each row (FBGEMM)"),
    FormatCase(
        "gptq-4",
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        gptq,
        holds="4 bits, a scale and a zero for each group",
    ),
    FormatCase(
        "gptq-8",
        {"quant_method": "gptq", "bits": 8, "group_size": 32},
        lambda weight: gptq(weight, 64, 8),
        holds="8 bits, a scale and a zero for each group",
    ),
    FormatCase(
        "gptq-act-order",
        {"quant_method": "gptq", "bits": 4, "desc_act": True},
        lambda weight: gptq(weight, shuffled=True),
        holds="4 bits, groups by activation order",
    ),
    FormatCase(
        "gptq-v2",
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda weight: gptq(weight, 64, version=2),
        holds="4 bits, the second version of zeros",
    ),
    FormatCase(
        "awq",
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
        awq,
        holds="4 bits, a scale and a zero for each group (gemm layout)",
    ),
    FormatCase(
        "compressed-int4",
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            **_weights(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
        },
        compressed_int4,
        holds="`pack-quantized`, symmetric",
    ),
    FormatCase(
        "compressed-int4-zeros",
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            **_weights(num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
        },
        lambda weight: compressed_int4(weight, symmetric=False),
        holds="`pack-quantized`, with zeros",
    ),
    FormatCase(
        "compressed-int8",
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            **_weights(num_bits=8, type="int", strategy="channel", symmetric=True),
        },
        compressed_int8,
        holds="`int-quantized`, a scale for each row",
    ),
    FormatCase(
        "compressed-fp8",
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            **_weights(num_bits=8, type="float", strategy="tensor", symmetric=True),
        },
        fp8_whole,
        holds="`float-quantized`, one scale for a matrix",
    ),
    FormatCase(
        "bitsandbytes-nf4",
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        bitsandbytes_nf4,
        holds="nf4, scales quantised too",
    ),
    FormatCase(
        "bitsandbytes-fp4",
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        lambda weight: bitsandbytes_nf4(weight, nested=False, kind="fp4"),
        holds="fp4",
    ),
    FormatCase(
        "bitsandbytes-int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes_int8, holds="int8"
    ),
)


def mxfp4(experts: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """gpt-oss's experts (experts, in, out) -> `_blocks` and `_scales`, and what they stand for, computed by
    `transformers`."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    count, width, out = experts.shape
    cut = experts.transpose(1, 2).reshape(count, out, width // 32, 32)
    exponent = torch.floor(torch.log2(cut.abs().amax(-1).clamp(min=1e-30))) - 2
    scaled = cut / torch.exp2(exponent)[..., None]
    codes = (scaled.abs()[..., None] - values).abs().argmin(-1) + 8 * (scaled < 0)
    blocks = (codes[..., ::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
    scales = (exponent + 127).to(torch.uint8)
    wide = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {"_blocks": blocks, "_scales": scales}, wide


def write(directory: Path, model: PreTrainedModel, settings: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """A checkpoint of one shard: the model's configuration, with how it is quantised, and these tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "quantization_config": dict(settings)}
    (directory / "config.json").write_text(json.dumps(config, default=str))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def quantise(model: PreTrainedModel, case: FormatCase, directory: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write `state`, the model's weights as its checkpoints name them, with the blocks' linear layers in the format.

    Returns: the same with dequantised weights.
    """
    stored, wide = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in state.items():
        is_linear = tensor.ndim == 2 and ".layers." in name and name.endswith("proj.weight")
        if not is_linear:
            stored[name], wide[name] = tensor, tensor
            continue
        made, wide[name] = case.pack(tensor.float())
        stored.update({name.removesuffix(".weight") + suffix: part for suffix, part in made.items()})
    write(directory, model, case.settings, stored)
    return wide
