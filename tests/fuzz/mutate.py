"""Changes valid inputs a little: bytes anywhere, values inside of protobuf messages, values inside of JSON.

Messages inside of frames are changed and framed again, so that what lies behind the first check is reached too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any, Literal

from petals.protocols.errors import ProtocolViolation
from petals.protocols.framing import FrameDecoder, encode_frame, encode_varint

Grammar = Literal["bytes", "proto", "frames", "json"]

NUMBERS = (
    0, 1, 2, 3, 4, 7, 31, 32, 127, 128, 255, 256, 4095, 4096, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, 1 << 62, (1 << 63) - 1, (1 << 64) - 1,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, 1e308, float("inf"), float("nan"), 10**30, -(10**30), 1 << 31, 1 << 40, "", "x",
    "\0", "\ud800", "../../etc/passwd", "x" * 5000, "9" * 5000, [], {}, [[]], [None], {"": None}, [1, "a", None], [-1],
    [1 << 62], ["F32"], {"a": {"b": []}},
)  # fmt: skip
MAX_BYTES = 1 << 17


def mutate(data: bytes, others: Sequence[bytes], dice: Random, grammar: Grammar) -> bytes:
    """`data`, changed in one to four places."""
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        way = grammar if dice.random() < 0.7 else "bytes"
        data = {"bytes": _bytes, "proto": _proto, "frames": _frames, "json": _json}[way](data, others, dice)
    return data[:MAX_BYTES]


def _bytes(data: bytes, others: Sequence[bytes], dice: Random) -> bytes:
    changed = bytearray(data)
    place = dice.randrange(len(changed) + 1)
    end = min(len(changed), place + dice.choice((1, 1, 2, 4, 8, 64)))
    match dice.randrange(9):
        case 0 if place < len(changed):
            changed[place] ^= 1 << dice.randrange(8)
        case 1 if place < len(changed):
            changed[place] = dice.randrange(256)
        case 2:
            changed[place:place] = dice.randbytes(dice.choice((1, 2, 8, 40)))
        case 3:
            del changed[place:end]
        case 4:
            changed[place:place] = changed[place:end] * dice.choice((1, 2, 100))
        case 5:
            other = dice.choice(others) if others else b""
            changed[place:] = other[dice.randrange(len(other) + 1) :]
        case 6:
            del changed[place:]
        case 7:
            changed[place:end] = encode_varint(dice.choice(NUMBERS))
        case _:
            kind = dice.choice(("<I", ">I", "<Q", ">Q", ">H"))
            size = struct.calcsize(kind)
            changed[place : place + size] = struct.pack(kind, dice.choice(NUMBERS) % (1 << 8 * size))
    return bytes(changed)


# -- protobuf, without its schema --------------------------------------------------------------------------------------

Field = tuple[int, int, Any]
"""(number, wire type, value)"""


def _fields(data: bytes) -> list[Field] | None:
    """The fields of a message; None if it is none."""
    found: list[Field] = []
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if position < 0 or tag >> 3 == 0:
            return None
        kind, value = tag & 7, None
        if kind == 0:
            value, position = _varint(data, position)
        elif kind in (1, 5):
            value, position = data[position : position + (8 if kind == 1 else 4)], position + (8 if kind == 1 else 4)
        elif kind == 2:
            size, position = _varint(data, position)
            value, position = (data[position : position + size], position + size) if position >= 0 else (b"", -1)
        else:
            return None
        if position < 0 or position > len(data):
            return None
        found.append((tag >> 3, kind, value))
    return found


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            return 0, -1
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    return 0, -1


def _joined(fields: Sequence[Field]) -> bytes:
    wire = bytearray()
    for number, kind, value in fields:
        wire += encode_varint(number << 3 | kind)
        wire += encode_varint(value) if kind == 0 else encode_varint(len(value)) + value if kind == 2 else value
    return bytes(wire)


def _proto(data: bytes, others: Sequence[bytes], dice: Random) -> bytes:
    fields = _fields(data)
    if not fields:
        return _bytes(data, others, dice)
    place = dice.randrange(len(fields))
    number, kind, value = fields[place]
    match dice.randrange(8):
        case 0:
            del fields[place]
        case 1:
            fields[place:place] = [fields[place]] * dice.choice((1, 1, 20, 600))
        case 2:
            fields[place] = (dice.randrange(1, 26), kind, value)
        case 3:
            fields.insert(place, (dice.randrange(1, 26), 0, dice.choice(NUMBERS)))
        case _ if kind == 0:
            fields[place] = (number, 0, dice.choice(NUMBERS))
        case _ if kind == 2:
            inner = _proto if dice.random() < 0.7 else _bytes
            fields[place] = (number, 2, inner(value, others, dice))
        case _:
            fields[place] = (number, kind, dice.choice((b"\0", b"\xff", bytes([0, 0, 0, 0, 0, 0, 0xF0, 0x7F]))) * 8)
            fields[place] = (number, kind, fields[place][2][: 8 if kind == 1 else 4])
    return _joined(fields)


def _frames(data: bytes, others: Sequence[bytes], dice: Random) -> bytes:
    """The first message of `data`, or one behind it, changed and framed again; payloads stay where they are."""
    decoder = FrameDecoder(MAX_BYTES)
    start = 0
    if dice.random() < 0.6:
        starts = [
            start
            for start in range(len(data))
            if 8 <= data[start] < 200 and data[start + 1 : start + 2] in b"\x0a\x12\x1a"
        ]
        start = dice.choice(starts) if starts else 0
    decoder.receive_data(data[start:])
    try:
        message = decoder.next_frame()
    except ProtocolViolation:
        message = None
    if message is None:
        return _bytes(data, others, dice)
    return data[:start] + encode_frame(_proto(message, others, dice)) + decoder.take_rest(MAX_BYTES)


# -- JSON --------------------------------------------------------------------------------------------------------------


def _json(data: bytes, others: Sequence[bytes], dice: Random) -> bytes:
    """One value anywhere inside replaced, removed, doubled or wrapped; also behind the first bytes of safetensors."""
    start = data.find(b"{")
    head, text = data[: max(start, 0)], data[max(start, 0) :]
    try:
        content, end = json.JSONDecoder().raw_decode(text.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return _bytes(data, others, dice)
    rest = text.decode("utf-8", "surrogateescape")[end:].encode("utf-8", "surrogateescape")
    body = b"[" * 100_000 if dice.random() < 0.01 else json.dumps(_changed(content, dice)).encode()
    if len(head) == 8 or (len(head) == 9 and head[0] < 2):  # safetensors: the header's length; an adapter's choice
        head = head[:-8] + struct.pack("<Q", len(body))
    return head + body + rest


def _changed(content: Any, dice: Random) -> Any:
    if isinstance(content, dict) and content and dice.random() < 0.85:
        key = dice.choice(list(content))
        match dice.randrange(6):
            case 0:
                return {name: value for name, value in content.items() if name != key}
            case 1:
                return {(dice.choice(("", "x", "0", "1" * 5000, "model.layers.99.w")) if name == key else name): value
                        for name, value in content.items()}  # fmt: skip
            case _:
                return content | {key: _changed(content[key], dice)}
    if isinstance(content, list) and content and dice.random() < 0.7:
        index = dice.randrange(len(content))
        match dice.randrange(4):
            case 0:
                return content[:index] + content[index + 1 :]
            case 1:
                return [*content, *content[index : index + 1] * dice.choice((1, 20))]
            case _:
                return [*content[:index], _changed(content[index], dice), *content[index + 1 :]]
    if isinstance(content, int) and not isinstance(content, bool) and dice.random() < 0.5:
        return content + dice.choice((-1, 1, 1000))
    return dice.choice(VALUES)
