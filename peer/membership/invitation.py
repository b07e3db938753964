"""Invitations from both sides: issuing one, and joining by one. What they say is protocols/admit.py."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio
from google.protobuf.message import DecodeError

from petals.peer.base.identity import Identity, IdentityError, create_identity, decode_identity, signer_of
from petals.peer.net.host import Host
from petals.peer.net.swarm_key import load_swarm_key
from petals.peer.net.wire.pnet import SwarmKey
from petals.protocols import messages_pb2 as pb
from petals.protocols.admit import (
    ADMIT_V1,
    MAX_ADDRS,
    MAX_MESSAGE_BYTES,
    MAX_USES,
    NONCE_BYTES,
    Invitation,
    Token,
    proof_text,
    read_token,
    write_token,
)
from petals.protocols.errors import (
    Forbidden,
    PeerUnreachable,
    ProtocolViolation,
    RemoteProtocolError,
    RequestRefused,
    UserError,
)
from petals.protocols.stream import MessageStream
from petals.protocols.types import PeerId

ADMIT_S = 5.0
"""One question and its answer."""


def issue(
    identity: Identity,
    *,
    expires_at: float,
    bearer: PeerId | None = None,
    uses: int = 1,
    model_digest: str = "",
    addrs: Sequence[str] = (),
    swarm_key: SwarmKey | None = None,
) -> str:
    """A token that `identity` answers for; one line.

    Raises:
        UserError: an invitation that can not be.
    """
    if bearer is not None and uses != 1:
        raise UserError("an invitation for one peer has no other uses: leave --uses or --peer out")
    if not 1 <= uses <= MAX_USES:
        raise UserError(f"--uses must be 1 to {MAX_USES}")
    if len(addrs) > MAX_ADDRS:
        raise UserError(f"an invitation has room for {MAX_ADDRS} addresses")
    if model_digest and (len(model_digest) != 64 or not set(model_digest) <= set("0123456789abcdef")):
        raise UserError("a model's digest is 64 hex digits: `petals status --json` shows it")
    holder = create_identity() if bearer is None else None
    invitation = Invitation(
        identity.peer_id,
        secrets.token_bytes(NONCE_BYTES),
        expires_at,
        model_digest=model_digest,
        bearer=bearer,
        uses=uses,
        addrs=tuple(addrs),
        holder=b"" if holder is None else holder.public_key,
    )
    key = None if swarm_key is None else swarm_key.secret
    holder_key = b"" if holder is None else holder.private_key
    return write_token(invitation, identity.public_key, identity.sign, holder_key=holder_key, swarm_key=key)


def accept(text: str, *, peer_id: PeerId | None, now: float) -> Token:
    """The token that a user has been given.

    Args:
        peer_id: ours, where it matters.
    Raises:
        UserError: it is none, or does not hold for us or now.
    """
    try:
        token = read_token(text.strip(), signer_of)
        if token.invitation.bearer is None:
            decode_identity(token.holder_key)
    except (ProtocolViolation, IdentityError) as error:
        raise UserError(f"--invitation: {error}") from None
    if now >= token.invitation.expires_at:
        raise UserError("the invitation has expired: ask for a new one")
    if peer_id is not None and token.invitation.bearer not in (None, peer_id):
        raise UserError(f"the invitation is for {token.invitation.bearer}, not for this peer: give its --identity")
    return token


@dataclass(frozen=True, slots=True)
class WayIn:
    """What it takes to join a swarm."""

    initial_peers: tuple[str, ...]
    swarm_key: SwarmKey | None = field(repr=False)
    token: Token | None = None
    """What servers are shown, and what proves that it is ours."""


def find_way_in(
    initial_peers: Sequence[str],
    swarm_key: Path | None,
    invitation: str | None,
    *,
    peer_id: PeerId | None = None,
    now: float,
) -> WayIn:
    """What is given in words, completed by what the invitation brings along.

    Raises:
        UserError: a swarm key that can not be read, an invitation that does not hold.
    """
    key = load_swarm_key(swarm_key)
    if invitation is None:
        return WayIn(tuple(initial_peers), key)
    token = accept(invitation, peer_id=peer_id, now=now)
    if key is None and token.swarm_key is not None:
        key = SwarmKey(token.swarm_key)
    return WayIn(tuple(initial_peers) or token.invitation.addrs, key, token)


def shown(token: Token, server: PeerId, bearer: PeerId) -> pb.AdmitRequest:
    """The token as that server is shown it: nobody else can be.

    Args:
        token: as `accept` gave it.
    """
    request = pb.AdmitRequest(invitation=token.signed)
    if token.invitation.bearer is None:
        request.proof = decode_identity(token.holder_key).sign(proof_text(server, bearer))
    return request


async def introduce(host: Host, token: Token, peer_id: PeerId) -> None:
    """Show a connected server our invitation. One that is open to all does not ask for it.

    Raises:
        Forbidden: it does not hold there. PeerUnreachable: no answer. RemoteProtocolError: nonsense.
    """
    with trio.move_on_after(ADMIT_S):
        try:
            stream = await host.open_stream(peer_id, ADMIT_V1)
        except RequestRefused:
            return
        messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
        try:
            try:
                await messages.write_message(shown(token, peer_id, host.peer_id).SerializeToString())
                data = await messages.read_message()
            except RequestRefused:  # a protocol that the peer spoke before on this connection is refused only now
                return
            if data is None:
                raise PeerUnreachable(f"peer …{peer_id[-6:]} ended the stream", peer_id)
            reply = pb.AdmitReply.FromString(data)
            if reply.HasField("error"):
                raise Forbidden(f"peer …{peer_id[-6:]} says: {reply.error.message[:500]}", peer_id)
            await messages.close()
            return
        except DecodeError:
            raise RemoteProtocolError("an answer to an invitation that does not decode", peer_id) from None
        except BaseException:
            await messages.reset()
            raise
    raise PeerUnreachable(f"peer …{peer_id[-6:]} did not answer to an invitation within {ADMIT_S:g} s", peer_id)
