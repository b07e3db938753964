"""Low-rank updates that a client sends along: their headers, checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import RemoteProtocolError
from petals.protocols.tensors import check_header

MAX_LORA_LAYERS = 512
"""In one request; their names must fit into a message."""
MAX_RANK = 1024
MAX_PATH = 200


def lora_payload(layers: Sequence[pb.LowRank], blocks: range) -> list[tuple[str, pb.Tensor, int]]:
    """The factors behind a message, as (name, header, bytes on the wire): A and B of each layer, in order.

    Raises:
        RemoteProtocolError: too many, a block that was not asked for, a layer named twice, factors that do not fit
            together.
    """
    if len(layers) > MAX_LORA_LAYERS:
        raise RemoteProtocolError(f"lora: {len(layers)} layers, allowed are {MAX_LORA_LAYERS}")
    plan: list[tuple[str, pb.Tensor, int]] = []
    seen: set[tuple[int, str]] = set()
    for index, layer in enumerate(layers):
        place = (layer.block, layer.path)
        if layer.block not in blocks or not 0 < len(layer.path) <= MAX_PATH or place in seen:
            raise RemoteProtocolError(f"lora: block {layer.block}, {layer.path[:MAX_PATH]!r}: not asked for, or twice")
        seen.add(place)
        a = check_header(layer.a, name="lora a", shape=(None, None))
        rank = layer.a.shape[0]
        b = check_header(layer.b, name="lora b", shape=(None, rank))
        if rank > MAX_RANK:
            raise RemoteProtocolError(f"lora: rank {rank}, allowed are {MAX_RANK}")
        plan += [(f"lora.{index}.a", layer.a, a), (f"lora.{index}.b", layer.b, b)]
    return plan
