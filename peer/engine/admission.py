"""Whose blocks these are for: everybody, or those who are listed or invited.

Only what computes is closed (inference, forward, backward). Who we are and what we hold, the directory and pings stay
open: a peer that may not ask must still be able to hold its part of the directory, and to learn that it may not ask.
Peers that are blocked are a matter of the host: their connections are closed (HostConfig.blocked). Pushes are open too:
they fit only into a session whose client, which was admitted, has named the pusher.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio
from google.protobuf.message import DecodeError

from petals.peer.base.rate_limit import MISTAKE
from petals.protocols import messages_pb2 as pb
from petals.protocols.admit import MAX_MESSAGE_BYTES, Invitation, Verify, objection, open_invitation, proof_text
from petals.protocols.errors import ProtocolViolation, RemoteProtocolError, SwarmError
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

ADMIT_S = 5.0
"""One question and its answer."""
MAX_INVITATIONS = 10_000
"""Remembered at a time; those that have expired make room."""


class NotAdmitted(SwarmError):
    """An invitation that does not hold; the message says why."""


class Admission:
    """Who may use the blocks of one server. Remembers until a restart.

    Args:
        own: the server itself, which may always, and whose invitations count.
        allowed: who may without being invited; None together with `invited_by`: nobody else; None alone: everybody.
        invited_by: whose invitations count besides our own; None: there are none.
        clock: seconds since 1970.
        charge: `Host.charge`: who shows what does not hold pays as for a mistake.
    """

    def __init__(
        self,
        own: PeerId,
        model_digest: str,
        *,
        allowed: frozenset[PeerId] | None = None,
        invited_by: frozenset[PeerId] | None = None,
        verify: Verify,
        clock: Callable[[], float],
        charge: Callable[[PeerId, int], None] = lambda *_: None,
    ) -> None:
        self._own = own
        self.is_open = allowed is None and invited_by is None
        self._allowed = (allowed or frozenset()) | {own}
        self._trusted = (invited_by or frozenset()) | {own}
        self._model_digest = model_digest
        self._verify, self._clock, self._charge = verify, clock, charge
        self._until: dict[PeerId, float] = {}
        self._bound: dict[tuple[PeerId, bytes], tuple[float, list[PeerId]]] = {}
        """(issuer, nonce) -> its expiry, and whom it has let in."""

    def admits(self, peer_id: PeerId) -> bool:
        """Whether that peer may use the blocks now."""
        return self.is_open or peer_id in self._allowed or self._clock() < self._until.get(peer_id, 0.0)

    def admit(self, peer_id: PeerId, request: pb.AdmitRequest) -> float:
        """Let a bearer in. Returns until when, 0 for who needs no invitation.

        Raises:
            ProtocolViolation: forged or malformed. NotAdmitted: why it does not hold for this peer, here and now.
        """
        if self.is_open or peer_id in self._allowed:
            return 0.0
        invitation = open_invitation(request.invitation, self._verify)
        now = self._clock()
        key = (invitation.issuer, invitation.nonce)
        _, bound = self._bound.get(key, (0.0, []))
        why_not = objection(
            invitation, peer_id, trusted=self._trusted, model_digest=self._model_digest, now=now, bound=bound
        )
        if why_not is None and invitation.bearer is None:
            said = proof_text(self._own, peer_id)
            if self._verify(invitation.holder, said, request.proof) is None:
                why_not = "the invitation is shown by somebody who does not hold it"
        if why_not is None and peer_id not in bound:
            why_not = self._bind(key, invitation, peer_id, now)
        if why_not is not None:
            raise NotAdmitted(why_not)
        self._until[peer_id] = max(self._until.get(peer_id, 0.0), invitation.expires_at)
        return self._until[peer_id]

    def _bind(self, key: tuple[PeerId, bytes], invitation: Invitation, peer_id: PeerId, now: float) -> str | None:
        if sum(len(peers) for _, peers in self._bound.values()) >= MAX_INVITATIONS:
            self._bound = {key: each for key, each in self._bound.items() if each[0] > now}
            self._until = {peer_id: until for peer_id, until in self._until.items() if until > now}
            if sum(len(peers) for _, peers in self._bound.values()) >= MAX_INVITATIONS:
                return f"{MAX_INVITATIONS} peers are invited here already"
        self._bound.setdefault(key, (invitation.expires_at, []))[1].append(peer_id)
        return None

    async def answer(self, stream: ByteStream) -> None:
        """Serve one `/petals/admit` stream."""
        messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
        with trio.move_on_after(ADMIT_S):
            data = await messages.read_message()
            if data is None:
                return
            try:
                request = pb.AdmitRequest.FromString(data)
            except DecodeError:
                raise RemoteProtocolError("an admission request that does not decode", stream.remote_peer) from None
            reply = pb.AdmitReply()
            try:
                reply.until = int(self.admit(stream.remote_peer, request))
            except ProtocolViolation as error:
                self._charge(stream.remote_peer, MISTAKE)
                reply.error.CopyFrom(pb.Error(code=pb.MALFORMED, message=str(error)))
            except NotAdmitted as error:
                self._charge(stream.remote_peer, MISTAKE)
                log.info("…%s is not admitted: %s", stream.remote_peer[-6:], error)
                reply.error.CopyFrom(pb.Error(code=pb.FORBIDDEN, message=str(error)))
            await messages.write_message(reply.SerializeToString())
