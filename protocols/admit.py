"""Who may use a server's blocks by invitation: one question, one answer, one stream; and the signed token itself.

An invitation says: whoever is named here (or comes first) may use the blocks of servers that trust its issuer, until
then. It proves itself, so that a server needs no list and no word from the issuer. Signing and checking keys is the
caller's: this room knows no cryptography.

Showing it gives it away to nobody. Where it names its bearer, the connection proves who that is. Where it does not, the
token holds a private key of its own, whose public half is signed; the bearer signs with it who shows what to whom, and
a server can not show that to another.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import ProtocolViolation
from petals.protocols.types import PeerId

ADMIT_V1 = "/petals/admit/1.0.0"

MAX_MESSAGE_BYTES = 8 << 10
NONCE_BYTES = 16
SWARM_KEY_BYTES = 32
MAX_ADDRS = 16
MAX_USES = 10_000
_SIGNED_AS = b"petals/invitation/1\n"

Sign = Callable[[bytes], bytes]
Verify = Callable[[bytes, bytes, bytes], PeerId | None]
"""(public key, data, signature) -> whose it is; None: not that key's signature."""


@dataclass(frozen=True, slots=True)
class Invitation:
    """What an issuer has signed."""

    issuer: PeerId
    nonce: bytes
    expires_at: float
    """Seconds since 1970."""
    model_digest: str = ""
    """Only servers of this model; empty: any."""
    bearer: PeerId | None = None
    """None: the first `uses` peers to come, at each server."""
    uses: int = 1
    addrs: tuple[str, ...] = ()
    """To join through."""
    holder: bytes = b""
    """The public half of the token's own key; none if the bearer is named."""


@dataclass(frozen=True, slots=True)
class Token:
    """What a bearer holds."""

    invitation: Invitation
    signed: pb.SignedInvitation
    """What servers are shown."""
    swarm_key: bytes | None = field(default=None, repr=False)
    holder_key: bytes = field(default=b"", repr=False)


def proof_text(server: PeerId, bearer: PeerId) -> bytes:
    """What a bearer signs with the token's key to show it."""
    return f"petals/admit/1\n{server}\n{bearer}".encode()


def write_token(
    invitation: Invitation,
    public_key: bytes,
    sign: Sign,
    *,
    holder_key: bytes = b"",
    swarm_key: bytes | None = None,
) -> str:
    """One line for people to pass on."""
    said = pb.Invitation(
        issuer=public_key,
        nonce=invitation.nonce,
        expires_at=int(invitation.expires_at),
        model_digest=invitation.model_digest,
        bearer=invitation.bearer or "",
        uses=invitation.uses,
        addrs=invitation.addrs,
        holder=invitation.holder,
    ).SerializeToString()
    signed = pb.SignedInvitation(invitation=said, signature=sign(_SIGNED_AS + said))
    token = pb.InvitationToken(signed=signed, swarm_key=swarm_key or b"", holder_key=holder_key)
    return base64.urlsafe_b64encode(token.SerializeToString()).rstrip(b"=").decode()


def read_token(text: str, verify: Verify) -> Token:
    """
    Raises:
        ProtocolViolation: it is no token, or was changed. The message quotes nothing of it.
    """
    try:
        if len(text) > 2 * MAX_MESSAGE_BYTES:
            raise ValueError
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        token = pb.InvitationToken.FromString(data)
    except (ValueError, binascii.Error, DecodeError):
        raise ProtocolViolation("no invitation: it is one line of letters, digits, - and _") from None
    if token.swarm_key and len(token.swarm_key) != SWARM_KEY_BYTES:
        raise ProtocolViolation("an invitation whose swarm key has not 32 bytes")
    return Token(open_invitation(token.signed, verify), token.signed, token.swarm_key or None, token.holder_key)


def open_invitation(signed: pb.SignedInvitation, verify: Verify) -> Invitation:
    """What was signed, once it is known by whom. Whether it still holds, and here, is for `objection`.

    Raises:
        ProtocolViolation: it does not decode, a field is out of its limits, or the signature is not its issuer's.
    """
    try:
        said = pb.Invitation.FromString(signed.invitation)
    except DecodeError:
        raise ProtocolViolation("an invitation that does not decode") from None
    if len(said.nonce) != NONCE_BYTES or len(said.addrs) > MAX_ADDRS or said.uses > MAX_USES:
        raise ProtocolViolation("an invitation with a field out of its limits")
    issuer = verify(said.issuer, _SIGNED_AS + signed.invitation, signed.signature)
    if issuer is None:
        raise ProtocolViolation("an invitation that its issuer has not signed")
    return Invitation(
        issuer,
        said.nonce,
        float(said.expires_at),
        said.model_digest,
        PeerId(said.bearer) if said.bearer else None,
        max(1, said.uses),
        tuple(said.addrs),
        said.holder,
    )


def objection(
    invitation: Invitation, peer_id: PeerId, *, trusted: frozenset[PeerId], model_digest: str, now: float,
    bound: Sequence[PeerId],
) -> str | None:  # fmt: skip
    """Why `peer_id` is not admitted with it; None: it is.

    Args:
        trusted: issuers whose word counts here.
        bound: peers that this server has admitted with it already.
    """
    if invitation.issuer not in trusted:
        return f"this server does not know the issuer …{invitation.issuer[-6:]}"
    if now >= invitation.expires_at:
        return "the invitation has expired"
    if invitation.model_digest not in ("", model_digest):
        return "the invitation is for another model"
    if invitation.bearer is not None:
        return None if invitation.bearer == peer_id else f"the invitation is for {invitation.bearer}, not {peer_id}"
    if peer_id not in bound and len(bound) >= invitation.uses:
        return "the invitation is used up: it holds for the peer IDs that came first (--identity keeps a peer's)"
    return None
