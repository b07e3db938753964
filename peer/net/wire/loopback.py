"""A peer that asks itself: two ends of a stream without a network between them."""

from __future__ import annotations

import trio

from petals.protocols.errors import PeerUnreachable
from petals.protocols.types import PeerId

WINDOW = 4 << 20
"""Bytes in flight each way; a step's tensors go through without waiting."""


class _Way:
    """One direction: what was written and not read yet."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.finished = self.dropped = False
        self._changed = trio.Event()

    def change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self) -> None:
        await self._changed.wait()


class LoopbackStream:
    """A ByteStream in memory; keeps every promise of the real ones (tests/transport/test_contract.py)."""

    def __init__(self, remote_peer: PeerId, out: _Way, back: _Way, broken: list[str]) -> None:
        self.remote_peer = remote_peer
        self._out, self._back, self._broken = out, back, broken
        self._closed = False

    @property
    def is_lost(self) -> bool:
        return bool(self._broken)

    async def read(self, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._back.buffer:
            if self._closed:
                raise trio.ClosedResourceError
            self._check()
            if self._back.finished:
                return b""
            await self._back.wait()
        data = bytes(self._back.buffer[:max_bytes])
        del self._back.buffer[:max_bytes]
        self._back.change()
        return data

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        try:
            await trio.lowlevel.checkpoint()
            while view:
                self._check()
                if self._out.finished:
                    raise trio.ClosedResourceError
                room = len(view) if self._out.dropped else WINDOW - len(self._out.buffer)
                if not self._out.dropped:
                    self._out.buffer += view[:room]
                view = view[room:]
                self._out.change()
                if view:
                    await self._out.wait()
        except trio.Cancelled:
            self._break()
            raise

    async def close_write(self) -> None:
        self._out.finished = True
        self._out.change()

    async def close(self) -> None:
        self._closed = self._back.dropped = True
        self._back.buffer.clear()
        self._back.change()
        await self.close_write()

    async def reset(self) -> None:
        self._break()

    def _break(self) -> None:
        if not (self._closed and self._out.finished):
            self._broken.append("reset")
            self._out.buffer.clear()
            self._back.buffer.clear()
        self._out.change()
        self._back.change()

    def _check(self) -> None:
        if self._broken:
            raise PeerUnreachable("the stream was reset", self.remote_peer)


def loopback_pair(near: PeerId, far: PeerId) -> tuple[LoopbackStream, LoopbackStream]:
    """The two ends; each names the other as its remote peer."""
    there, back, broken = _Way(), _Way(), list[str]()
    return LoopbackStream(far, there, back, broken), LoopbackStream(near, back, there, broken)
