"""The only file of this room that awaits: byte streams in, messages out."""

from __future__ import annotations

from typing import Protocol

from petals.protocols.types import PeerId


class ByteStream(Protocol):
    """One bidirectional stream to one peer. Any call may be cancelled; a cut write leaves the stream reset."""

    @property
    def remote_peer(self) -> PeerId:
        """Who is on the other end, as authenticated by the connection."""
        ...

    async def read(self, max_bytes: int) -> bytes | bytearray | memoryview:
        """At least one and at most `max_bytes` bytes; empty at the clean end.

        Raises:
            PeerUnreachable: the stream was reset or its connection died.
        """
        ...

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`; returns once it is queued within the stream's window.

        Raises:
            PeerUnreachable: the stream was reset or its connection died.
        """
        ...

    async def close_write(self) -> None:
        """Say that no more bytes follow; reading goes on."""
        ...

    async def close(self) -> None:
        """End both directions cleanly. Idempotent."""
        ...

    async def reset(self) -> None:
        """End both directions at once; what was in flight is lost. Idempotent, never raises."""
        ...
