"""Whose blocks these are for: everybody, or those who are listed or invited.

Only what computes is closed (inference, forward, backward). Who we are and what we hold, the directory and pings stay
open: a peer that may not ask must still be able to hold its part of the directory, and to learn that it may not ask.
Peers that are blocked are a matter of the host: their connections are closed (HostConfig.blocked). Pushes are open too:
they fit only into a session whose client, which was admitted, has named the pusher.
"""

from __future__ import annotations

from petals.protocols.types import PeerId


class Admission:
    """Who may use the blocks of one server.

    Args:
        own: the server itself, which may always.
        allowed: None: everybody.
    """

    def __init__(self, own: PeerId, allowed: frozenset[PeerId] | None = None) -> None:
        self._own = own
        self._allowed = allowed

    def admits(self, peer_id: PeerId) -> bool:
        """Whether that peer may use the blocks now."""
        return self._allowed is None or peer_id == self._own or peer_id in self._allowed
