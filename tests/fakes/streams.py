"""Two ends of a stream without a network: `from tests.fakes.streams import memory_stream_pair`.

They are the streams a peer uses to ask itself, and the contract suite (tests/transport/test_contract.py) runs on them.
"""

from __future__ import annotations

from petals.peer.net.wire.loopback import LoopbackStream, loopback_pair
from petals.protocols.types import PeerId


def memory_stream_pair(near: str = "peer-near", far: str = "peer-far") -> tuple[LoopbackStream, LoopbackStream]:
    """The two ends; each names the other as its remote peer."""
    return loopback_pair(PeerId(near), PeerId(far))
