"""Two ends of a stream without a network: `from tests.fakes.streams import memory_stream_pair`."""

from __future__ import annotations

from petals.peer.transport.loopback import LoopbackStream, loopback_pair
from petals.protocols.types import PeerId


class MemoryStream(LoopbackStream):
    """A loopback stream that remembers.

    Attributes:
        sent: every byte ever written at this end.
    """

    sent: bytearray

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        await super().write(data)
        self.sent += data


def memory_stream_pair(near: str = "peer-near", far: str = "peer-far") -> tuple[MemoryStream, MemoryStream]:
    """The two ends; each names the other as its remote peer."""
    ends = loopback_pair(PeerId(near), PeerId(far))
    for end in ends:
        end.__class__ = MemoryStream
        end.sent = bytearray()  # type: ignore[attr-defined]
    return ends  # type: ignore[return-value]
