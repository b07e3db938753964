"""Activations straight from one server of a route to the next: one push a stream, no answer."""

from __future__ import annotations

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import RemoteProtocolError
from petals.protocols.tensors import check_header

PUSH_V1 = "/petals/push/1.0.0"


def push_payload(push: pb.Push, batch_size: int, max_length: int, hidden_size: int) -> int:
    """Bytes behind a push to a session of this size, before any of them is read.

    Raises:
        RemoteProtocolError: a dtype, shape or size that no step of that session has.
    """
    size = check_header(push.hidden, name="pushed hidden", shape=(batch_size, None, hidden_size))
    if push.hidden.shape[1] > max_length:
        raise RemoteProtocolError(f"a push of {push.hidden.shape[1]} tokens to a session of {max_length}")
    return size
