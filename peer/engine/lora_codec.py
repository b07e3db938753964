"""A client's low-rank updates on their way: `Lora` to messages and payload, and back."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence

from torch import Tensor

from petals.models.blocks.adapters import Lora, LowRank
from petals.protocols import messages_pb2 as pb
from petals.protocols.evidence import NOTHING
from petals.protocols.tensors import digest_tensor, encode_tensor


def encode_lora(lora: Lora | None, blocks: range) -> tuple[list[pb.LowRank], list[memoryview]]:
    """What of an update concerns `blocks`: the messages, and the payload behind them."""
    layers: list[pb.LowRank] = []
    payload: list[memoryview] = []
    for (block, path), layer in lora.of(blocks).layers.items() if lora is not None else ():
        a, pieces_a = encode_tensor(layer.a)
        b, pieces_b = encode_tensor(layer.b)
        layers.append(pb.LowRank(block=block, path=path, a=a, b=b, scaling=layer.scaling))
        payload += pieces_a + pieces_b
    return layers, payload


def decode_lora(layers: Sequence[pb.LowRank], tensors: Mapping[str, Tensor]) -> Lora | None:
    """The update out of messages and their payload, named as `lora_payload` names it; None: there was none."""
    if not layers:
        return None
    return Lora(
        "sent by the client",
        {
            (layer.block, layer.path): LowRank(tensors[f"lora.{index}.a"], tensors[f"lora.{index}.b"], layer.scaling)
            for index, layer in enumerate(layers)
        },
    )


def digest_lora(lora: Lora | None, blocks: range) -> bytes:
    """What of an update concerns `blocks`, as one digest; the same at both ends."""
    layers = lora.of(blocks).layers if lora is not None else {}
    if not layers:
        return NOTHING
    digest = hashlib.sha256()
    for (block, path), layer in layers.items():
        name = path.encode()
        digest.update(struct.pack("<IHf", block, len(name), layer.scaling) + name)
        digest.update(digest_tensor(layer.a) + digest_tensor(layer.b))
    return digest.digest()
