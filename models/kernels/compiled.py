"""The kernels of backends.py, for numba to compile. Imported only where numba is.

A decoder writes one row of a matrix into a buffer of float32. `kernel` makes of it a product. Numbers are picked out of
bytes by intrinsics, which are written as LLVM instructions on 32 bits: numba's own integers have 64, and half as many
of those fit into a vector register. Indices are unsigned, since for signed ones numba looks whether they are negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I32, _F32 = ir.IntType(32), ir.FloatType()
_part: Any = numba.njit(nogil=True, fastmath=True, boundscheck=False, error_model="numpy")
_U: Any = np.uint64
_F: Any = np.float32


def _of_byte(build: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic uint8 -> float32; `build` is given the builder and the byte as 32 bits."""

    def typed(context: Any, byte: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return build(builder, builder.zext(arguments[0], _I32))

        return types.float32(types.uint8), generate

    return intrinsic(typed)


def _word(value: int) -> Any:
    return ir.Constant(_I32, value)


def _e4m3(builder: Any, byte: Any) -> Any:
    """Times 2**-120: the exponent's bias of float32 instead of e4m3's."""
    sign = builder.shl(builder.and_(byte, _word(0x80)), _word(24))
    return builder.bitcast(builder.or_(sign, builder.shl(builder.and_(byte, _word(0x7F)), _word(20))), _F32)


def _e2m1(builder: Any, code: Any) -> Any:
    """Times 2: 0, 1, 2, 3, 4, 6, 8, 12, and their negatives."""
    size = builder.and_(code, _word(7))
    value = size
    for above, more in ((4, 1), (5, 1), (6, 3)):
        here = builder.icmp_unsigned(">", size, _word(above))
        value = builder.add(value, builder.select(here, _word(more), _word(0)))
    magnitude = builder.bitcast(builder.sitofp(value, _F32), _I32)
    return builder.bitcast(builder.or_(magnitude, builder.shl(builder.and_(code, _word(8)), _word(28))), _F32)


def _high(builder: Any, byte: Any) -> Any:
    return builder.lshr(byte, _word(4))


def _number(builder: Any, value: Any) -> Any:
    return builder.sitofp(value, _F32)


_from_e4m3 = _of_byte(_e4m3)
_low_e2m1 = _of_byte(_e2m1)
_high_e2m1 = _of_byte(lambda builder, byte: _e2m1(builder, _high(builder, byte)))
_low = _of_byte(lambda builder, byte: _number(builder, builder.and_(byte, _word(15))))
_high_float = _of_byte(lambda builder, byte: _number(builder, _high(builder, byte)))
_unsigned = _of_byte(_number)
_signed = _of_byte(lambda builder, byte: _number(builder, builder.ashr(builder.shl(byte, _word(24)), _word(24))))


@intrinsic
def _joined(context: Any, low: Any, high: Any, shift: Any) -> Any:
    """(low & 15 | (high >> shift & 3) << 4): six bits of two planes, as float32; of five bits the mask is the same,
    since the planes are shifted by the caller."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low, high, shift = (builder.zext(value, _I32) for value in arguments)
        top = builder.shl(builder.and_(builder.lshr(high, shift), _word(3)), _word(4))
        return builder.sitofp(builder.or_(builder.and_(low, _word(15)), top), _F32)

    return types.float32(types.uint8, types.uint8, types.uint8), generate


@intrinsic
def _fifth(context: Any, low: Any, high: Any, shift: Any) -> Any:
    """(low & 15 | (high >> shift & 1) << 4), as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low, high, shift = (builder.zext(value, _I32) for value in arguments)
        top = builder.shl(builder.and_(builder.lshr(high, shift), _word(1)), _word(4))
        return builder.sitofp(builder.or_(builder.and_(low, _word(15)), top), _F32)

    return types.float32(types.uint8, types.uint8, types.uint8), generate


@intrinsic
def _half(context: Any, low: Any, high: Any) -> Any:
    """Two bytes of a float16, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        short = ir.IntType(16)
        low, high = (builder.zext(value, short) for value in arguments)
        bits = builder.or_(low, builder.shl(high, ir.Constant(short, 8)))
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), _F32)

    return types.float32(types.uint8, types.uint8), generate


def _of_bits(kind: Any, bits: int, build: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic from an integer type to float32."""

    def typed(context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return build(builder, arguments[0])

        return types.float32(kind), generate

    return intrinsic(typed)


def _exponent(builder: Any, byte: Any) -> Any:
    wide = builder.zext(byte, _I32)
    least = builder.icmp_unsigned("==", wide, _word(0))
    return builder.bitcast(builder.select(least, _word(1 << 22), builder.shl(wide, _word(23))), _F32)


_e8m0 = _of_bits(types.uint8, 8, _exponent)
_float16 = _of_bits(types.uint16, 16, lambda builder, bits: builder.fpext(builder.bitcast(bits, ir.HalfType()), _F32))
_bfloat16 = _of_bits(
    types.int16, 16, lambda builder, bits: builder.bitcast(builder.shl(builder.zext(bits, _I32), _word(16)), _F32)
)


@_part
def _float32(value: Any) -> Any:
    return value


_SCALES = {"uint8": _e8m0, "uint16": _float16, "int16": _bfloat16, "float32": _float32}
"""What makes float32 of a scale, by the dtype that numpy sees it in."""


def _nibble_row(kind: str, scale_of: Any) -> Any:
    """The decoder of a `NibbleMatrix`: weights of even inputs first, then those of odd ones."""
    low, high = (_low_e2m1, _high_e2m1) if kind == "e2m1" else (_low, _high_float)
    factor = 0.5 if kind == "e2m1" else 1.0

    @_part
    def by_number(r: Any, out: Any, parts: Any) -> None:
        codes, scale, zero, _, half = parts
        row, scales, plane = codes[r], scale[r], _U(codes.shape[1])
        zeros = zero[r if zero.shape[0] > 1 else 0]
        for g in range(_U(scales.shape[0])):
            f = scale_of(scales[g]) * _F(factor)
            taken = _F(zeros[g if zero.shape[0] > 1 else _U(0)]) * f
            at = g * _U(half)
            for k in range(_U(half)):
                out[at + k] = low(row[at + k]) * f - taken
                out[plane + at + k] = high(row[at + k]) * f - taken

    @_part
    def by_table(r: Any, out: Any, parts: Any) -> None:
        codes, scale, _, table, half = parts
        row, scales, plane = codes[r], scale[r], _U(codes.shape[1])
        for g in range(_U(scales.shape[0])):
            f = scale_of(scales[g])
            at = g * _U(half)
            for k in range(_U(half)):
                code = row[at + k]
                out[at + k] = table[code & np.uint8(15)] * f
                out[plane + at + k] = table[code >> np.uint8(4)] * f

    return by_table if kind == "table" else by_number


def _byte_row(scale_of: Any, *, signed: bool) -> Any:
    """The decoder of an `Int8Matrix`."""
    number = _signed if signed else _unsigned

    @_part
    def decode(r: Any, out: Any, parts: Any) -> None:
        codes, scale, zero, _, width = parts
        row, scales = codes[r], scale[r]
        zeros = zero[r if zero.shape[0] > 1 else 0]
        for g in range(_U(scales.shape[0])):
            f = scale_of(scales[g])
            taken = _F(zeros[g if zero.shape[0] > 1 else _U(0)]) * f
            at = g * _U(width)
            for k in range(_U(width)):
                out[at + k] = number(row[at + k]) * f - taken

    return decode


@_part
def _q4_0_row(r: Any, out: Any, parts: Any) -> None:
    row, run = (
        parts[0][r],
        _U(parts[1]),
    )  # not a constant: else loops are unrolled
    for b in range(_U(row.shape[0]) // _U(18)):
        at, o = b * _U(18), b * _U(32)
        d = _half(row[at], row[at + _U(1)])
        for k in range(run):
            out[o + k] = (_low(row[at + _U(2) + k]) - _F(8)) * d
            out[o + _U(16) + k] = (_high_float(row[at + _U(2) + k]) - _F(8)) * d


@_part
def _q4_1_row(r: Any, out: Any, parts: Any) -> None:
    row, run = (
        parts[0][r],
        _U(parts[1]),
    )  # not a constant: else loops are unrolled
    for b in range(_U(row.shape[0]) // _U(20)):
        at, o = b * _U(20), b * _U(32)
        d, m = _half(row[at], row[at + _U(1)]), _half(row[at + _U(2)], row[at + _U(3)])
        for k in range(run):
            out[o + k] = _low(row[at + _U(4) + k]) * d + m
            out[o + _U(16) + k] = _high_float(row[at + _U(4) + k]) * d + m


@_part
def _q8_0_row(r: Any, out: Any, parts: Any) -> None:
    row, run = (
        parts[0][r],
        _U(parts[1]),
    )  # not a constant: else loops are unrolled
    for b in range(_U(row.shape[0]) // _U(34)):
        at, o = b * _U(34), b * _U(32)
        d = _half(row[at], row[at + _U(1)])
        for k in range(run):
            out[o + k] = _signed(row[at + _U(2) + k]) * d


@_part
def _k_scale(row: Any, at: Any, j: Any) -> Any:
    """Scale and min of the j-th run of 32 weights, six bits each (ggml.py)."""
    if j < _U(4):
        return _F(row[at + j] & np.uint8(63)), _F(row[at + _U(4) + j] & np.uint8(63))
    low, rest = row[at + j - _U(4)], row[at + _U(4) + j]
    high = row[at + j]
    scale = (rest & np.uint8(15)) | ((low >> np.uint8(6)) << np.uint8(4))
    least = (rest >> np.uint8(4)) | ((high >> np.uint8(6)) << np.uint8(4))
    return _F(scale), _F(least)


@_part
def _q4_k_row(r: Any, out: Any, parts: Any) -> None:
    row, run = (
        parts[0][r],
        _U(parts[1]),
    )  # not a constant: else loops are unrolled
    for b in range(_U(row.shape[0]) // _U(144)):
        at = b * _U(144)
        d, dmin = _half(row[at], row[at + _U(1)]), _half(row[at + _U(2)], row[at + _U(3)])
        for j in range(_U(4)):
            s0, m0 = _k_scale(row, at + _U(4), _U(2) * j)
            s1, m1 = _k_scale(row, at + _U(4), _U(2) * j + _U(1))
            s0, m0, s1, m1 = s0 * d, m0 * dmin, s1 * d, m1 * dmin
            q, o = at + _U(16) + _U(32) * j, b * _U(256) + _U(64) * j
            for k in range(run):
                out[o + k] = _low(row[q + k]) * s0 - m0
                out[o + _U(32) + k] = _high_float(row[q + k]) * s1 - m1


@_part
def _q5_k_row(r: Any, out: Any, parts: Any) -> None:
    row, run = (
        parts[0][r],
        _U(parts[1]),
    )  # not a constant: else loops are unrolled
    for b in range(_U(row.shape[0]) // _U(176)):
        at = b * _U(176)
        d, dmin = _half(row[at], row[at + _U(1)]), _half(row[at + _U(2)], row[at + _U(3)])
        for j in range(_U(4)):
            s0, m0 = _k_scale(row, at + _U(4), _U(2) * j)
            s1, m1 = _k_scale(row, at + _U(4), _U(2) * j + _U(1))
            s0, m0, s1, m1 = s0 * d, m0 * dmin, s1 * d, m1 * dmin
            q, o, h = at + _U(48) + _U(32) * j, b * _U(256) + _U(64) * j, at + _U(16)
            first, second = np.uint8(_U(2) * j), np.uint8(_U(2) * j + _U(1))
            for k in range(run):
                out[o + k] = _fifth(row[q + k], row[h + k], first) * s0 - m0
                out[o + _U(32) + k] = _fifth(row[q + k] >> np.uint8(4), row[h + k], second) * s1 - m1


@_part
def _q6_k_row(r: Any, out: Any, parts: Any) -> None:
    row, run = (
        parts[0][r],
        _U(parts[1]),
    )  # not a constant: else loops are unrolled
    for b in range(_U(row.shape[0]) // _U(210)):
        at = b * _U(210)
        d = _half(row[at + _U(208)], row[at + _U(209)])
        for n in range(_U(2)):
            low, high = at + _U(64) * n, at + _U(128) + _U(32) * n
            o, s = b * _U(256) + _U(128) * n, at + _U(192) + _U(8) * n
            for part in range(_U(2)):  # of 16 weights, which share their scales
                i = _U(16) * part
                f0, f1 = _signed(row[s + part]) * d, _signed(row[s + _U(2) + part]) * d
                f2, f3 = _signed(row[s + _U(4) + part]) * d, _signed(row[s + _U(6) + part]) * d
                for k in range(i, i + run):
                    a, c, h = row[low + k], row[low + _U(32) + k], row[high + k]
                    out[o + k] = (_joined(a, h, np.uint8(0)) - _F(32)) * f0
                    out[o + _U(32) + k] = (_joined(c, h, np.uint8(2)) - _F(32)) * f1
                    out[o + _U(64) + k] = (_joined(a >> np.uint8(4), h, np.uint8(4)) - _F(32)) * f2
                    out[o + _U(96) + k] = (_joined(c >> np.uint8(4), h, np.uint8(6)) - _F(32)) * f3


_ROWS = {
    "Q4_0": _q4_0_row,
    "Q4_1": _q4_1_row,
    "Q8_0": _q8_0_row,
    "Q4_K": _q4_k_row,
    "Q5_K": _q5_k_row,
    "Q6_K": _q6_k_row,
}


@_part
def _fp8_row(r: Any, out: Any, parts: Any) -> None:
    codes, scale, height, width = parts
    row, scales, n = codes[r], scale[r // height], _U(codes.shape[1])
    for g in range(_U(scales.shape[0])):
        f = scales[g] * _F(2.0**120)
        at = g * _U(width)
        for k in range(at, min(at + _U(width), n)):
            out[k] = _from_e4m3(row[k]) * f


@_part
def _dots(wide: Any, x: Any, y: Any, r: Any) -> None:
    """y[:, r] = x @ wide, four rows of x at a time."""
    n, count = _U(x.shape[1]), x.shape[0]
    done = 0
    while done + 4 <= count:
        a, b, c, d = x[done], x[done + 1], x[done + 2], x[done + 3]
        s, t, u, v = _F(0), _F(0), _F(0), _F(0)
        for k in range(n):
            w = wide[k]
            s += w * a[k]
            t += w * b[k]
            u += w * c[k]
            v += w * d[k]
        y[done, r], y[done + 1, r], y[done + 2, r], y[done + 3, r] = s, t, u, v
        done += 4
    while done < count:
        a, s = x[done], _F(0)
        for k in range(n):
            s += wide[k] * a[k]
        y[done, r] = s
        done += 1


@_part
def _fp8_few(x: Any, y: Any, first: Any, last: Any, parts: Any) -> None:
    """Blocks of rows share their scales, so the input is scaled instead of the weights, and one row needs no buffer."""
    codes, scale, height, width = parts
    n = _U(x.shape[1])
    scaled = np.empty(x.shape, np.float32)
    wide = np.empty(x.shape[1], np.float32)
    block = -1
    for r in range(first, last):
        if r // height != block:
            block = r // height
            for i in range(x.shape[0]):
                for k in range(n):
                    scaled[i, k] = x[i, k] * (scale[block, k // _U(width)] * _F(2.0**60))
        row = codes[r]
        if x.shape[0] == 1:
            only, total = scaled[0], _F(0)
            for k in range(n):
                total += _from_e4m3(row[k]) * only[k]
            y[0, r] = total * _F(2.0**60)
        else:
            for k in range(n):
                wide[k] = _from_e4m3(row[k]) * _F(2.0**60)
            _dots(wide, scaled, y, r)


def _decoder(kind: str) -> Any:
    if kind == "fp8":
        return _fp8_row
    if kind in _ROWS:
        return _ROWS[kind]
    name, _, scale = kind.partition("/")
    scale_of = _SCALES[scale]
    return _byte_row(scale_of, signed=name == "int8") if name.endswith("int8") else _nibble_row(name, scale_of)


def kernels(kind: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """By name: few(x (rows, in), y (rows, out), first, last, parts) writes y[:, first:last], the product of those rows;
    unpack(out (last - first, in), first, last, parts) writes those rows."""
    decode = _decoder(kind)

    @_part
    def few(x: Any, y: Any, first: Any, last: Any, parts: Any) -> None:
        wide = np.empty(x.shape[1], np.float32)
        for r in range(first, last):
            decode(r, wide, parts)
            _dots(wide, x, y, r)

    @_part
    def unpack(out: Any, first: Any, last: Any, parts: Any) -> None:
        for r in range(first, last):
            decode(r, out[r - first], parts)

    return _fp8_few if kind == "fp8" else few, unpack
