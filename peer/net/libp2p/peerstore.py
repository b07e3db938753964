"""What is kept of a peer's own word about where it is: a little, however much it says.

py-libp2p 0.8.1 remembers a thousand peers, but of each up to a thousand addresses of any length and a signed record of
a mebibyte, and repeats both in answers to others' questions: one fat record makes an answer about the honest ones too
long to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from libp2p.peer.envelope import Envelope
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from multiaddr import Multiaddr  # type: ignore[import-untyped]

MAX_ADDRS = 32
"""Of one peer; more of them, and the old ones are forgotten."""
MAX_NAMED = 1024
"""Looked at, at once."""
MAX_ADDR_BYTES = 256
MAX_RECORD_BYTES = 8 << 10


class BoundedPeerStore(PeerStore):
    """The library's, with a bound for each peer.

    Args:
        plausible: (peer, addresses that it is said to have) -> those that may be true (dial_policy.py).
    """

    def __init__(self, plausible: Callable[[ID, Sequence[Multiaddr]], Sequence[Multiaddr]]) -> None:
        super().__init__()
        self._plausible = plausible

    def add_addrs(self, peer_id: ID, addrs: Sequence[Multiaddr], ttl: int = 0) -> None:
        fitting = [addr for addr in addrs[:MAX_NAMED] if len(addr.to_bytes()) <= MAX_ADDR_BYTES]
        fitting = list(self._plausible(peer_id, fitting[:MAX_ADDRS]))
        known = self.peer_data_map.get(peer_id)
        if known is not None and len({*known.get_addrs(), *fitting}) > MAX_ADDRS:
            known.clear_addrs()
        super().add_addrs(peer_id, fitting, ttl)

    def consume_peer_record(self, envelope: Envelope, ttl: int) -> bool:
        if len(envelope.marshal_envelope()) > MAX_RECORD_BYTES:
            return False
        return super().consume_peer_record(envelope, ttl)
