"""What carries a private swarm's bytes: the key's cipher (pnet.py) around a raw connection, and around a pipe.

The handshake speaks through the raw connection, the muxer through the pipe; both share one cipher, whose key streams go
on where the other stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from libp2p.abc import IRawConnection
from libp2p.connection_types import ConnectionType
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.peer.net.wire.byte_pipe import Pipe
from petals.peer.net.wire.pnet import SwarmCipher


class PrivateConnection(IRawConnection):
    """A raw connection under a swarm key. `begin` comes first."""

    def __init__(self, carrier: IRawConnection, cipher: SwarmCipher) -> None:
        self.carrier, self.cipher = carrier, cipher
        self.is_initiator = carrier.is_initiator

    async def begin(self) -> None:
        """Say our nonce. The other end's is read with its first bytes: nobody waits for a round trip."""
        await self.carrier.write(self.cipher.nonce)

    async def read(self, n: int | None = None) -> bytes:
        while wanted := self.cipher.nonce_wanted():
            nonce = await self.carrier.read(wanted)
            if not nonce:
                return b""
            self.cipher.receive_nonce(nonce)
        data = bytearray(await self.carrier.read(n))
        self.cipher.open(memoryview(data))
        return bytes(data)

    async def write(self, data: bytes) -> None:
        await self.carrier.write(self.cipher.seal(data))

    async def close(self) -> None:
        await self.carrier.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.carrier.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self.carrier.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self.carrier.get_connection_type()


class PrivatePipe:
    """A pipe under a swarm key, after the handshake.

    What the carrier did not take at once has been ciphered already and is kept as it is: the caller comes back with the
    same bytes first (`Pipe.try_send` says so), and they are not ciphered twice.
    """

    def __init__(self, carrier: Pipe, cipher: SwarmCipher) -> None:
        self._carrier, self._cipher = carrier, cipher
        self._sealed = memoryview(b"")
        """Ciphered and not sent."""

    async def receive_into(self, buffer: memoryview) -> int:
        received = await self._carrier.receive_into(buffer)
        self._cipher.open(buffer[:received])
        return received

    def try_send(self, pieces: Sequence[bytes | memoryview]) -> int:
        if self._sealed:
            return 0
        data = self._cipher.seal(b"".join(pieces))
        self._sealed = memoryview(data)  # also when the carrier raises: the stream has moved on
        sent = self._carrier.try_send([data])
        self._sealed = self._sealed[sent:]
        return sent

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        fresh = memoryview(data)[len(self._sealed) :]
        sealed = b"".join((self._sealed, self._cipher.seal(fresh)))
        self._sealed = memoryview(b"")
        await self._carrier.send_all(sealed)

    async def send_eof(self) -> None:
        await self._carrier.send_eof()

    async def aclose(self) -> None:
        await self._carrier.aclose()
