"""Reference dequantisers of the blocks in GGUF files, from ggml's definition of them (ggml-common.h, ggml-quants.c).

A row of a matrix is a sequence of blocks, each of 32 or 256 weights. `d`, `m` and `dmin` are float16, little-endian.

| type | weights, bytes | a block |
|---|---|---|
| Q4_0 | 32, 18 | d, 16 bytes: low nibbles are weights 0-15, high ones 16-31; (q - 8) * d |
| Q4_1 | 32, 20 | d, m, 16 bytes as in Q4_0; q * d + m |
| Q8_0 | 32, 34 | d, 32 int8; q * d |
| Q4_K | 256, 144 | d, dmin, 12 bytes of 6-bit scales and mins, 128 of nibbles; q * d * scale - dmin * min |
| Q5_K | 256, 176 | as Q4_K, with 32 bytes of fifth bits in front of the nibbles |
| Q6_K | 256, 210 | 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, d; (q - 32) * d * scale |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

GGML_TYPES: Mapping[str, tuple[int, int]] = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
"""Weights and bytes of a block."""


def dequantise_rows(rows: Tensor, kind: str) -> Tensor:
    """(rows, bytes of a row) uint8 -> (rows, weights of a row) float32."""
    weights, nbytes = GGML_TYPES[kind]
    values = _READERS[kind](rows.reshape(-1, nbytes))
    return values.reshape(len(rows), rows.shape[1] // nbytes * weights)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of every block: (blocks, 1) float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """(n, bytes) -> (n, 2, bytes): the low ones, and the high ones."""
    return torch.stack([packed & 15, packed >> 4], 1)


def _q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 2:]).flatten(1).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).flatten(1) * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8) * _half(blocks, 0)


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes -> eight scales and eight mins of six bits each, float32.

    The first four of each are the low six bits of bytes 0-3 and 4-7. Of the other four, bytes 8-11 have the low four
    bits (of scales the lower nibble), and the two high bits of bytes 0-3 and 4-7 the rest.
    """
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([low & 63, (rest & 15) | ((low >> 6) << 4)], 1)
    mins = torch.cat([high & 63, (rest >> 4) | ((high >> 6) << 4)], 1)
    return scales.float(), mins.float()


def _k_values(blocks: Tensor, quants: Tensor) -> Tensor:
    """quants (blocks, 8, 32) of Q4_K or Q5_K."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    scaled = quants.float().mul_((_half(blocks, 0) * scales)[..., None])
    return scaled.sub_((_half(blocks, 2) * mins)[..., None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _k_values(blocks, _nibbles(blocks[:, 16:].reshape(-1, 32)).view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:].reshape(-1, 32)).view(-1, 8, 32)
    fifth = torch.stack([(blocks[:, 16:48] >> bit) & 1 for bit in range(8)], 1)
    return _k_values(blocks, low | (fifth << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    # each half of a block has 64 bytes of low nibbles and 32 of high pairs for 128 weights, in four runs of 32
    low = blocks[:, :128].view(-1, 2, 2, 32)
    low = torch.cat([low & 15, low >> 4], 2)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 2)
    quants = (low | (high << 4)).view(-1, 16, 16).float() - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8) * _half(blocks, 208)
    return (quants * scales[..., None]).flatten(1)


_READERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
