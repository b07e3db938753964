"""Invitations: what a token says, who is admitted with it, and what it is worth to whoever sees it shown."""

from __future__ import annotations

import base64
import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals.peer.base.identity import create_identity, signer_of
from petals.peer.engine import admission
from petals.peer.engine.admission import Admission, NotAdmitted
from petals.peer.membership.invitation import accept, find_way_in, issue, shown
from petals.peer.net.wire.pnet import SwarmKey
from petals.peer.pretrained import ClientConfig
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import ProtocolViolation, UserError
from petals.protocols.types import PeerId

ISSUER, SERVER, OTHER_SERVER = create_identity(), create_identity(), create_identity()
ALICE, BOB = create_identity().peer_id, create_identity().peer_id
DIGEST, NOW = "ab" * 32, 1_000_000.0
WEEK = 7 * 86400.0


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


def a_server(own: PeerId = SERVER.peer_id, *, clock: Clock | None = None, **settings: object) -> Admission:
    known: dict[str, object] = {"invited_by": frozenset({ISSUER.peer_id}), **settings}
    return Admission(own, DIGEST, verify=signer_of, clock=clock or Clock(), **known)  # type: ignore[arg-type]


def request(text: str, bearer: PeerId, server: PeerId = SERVER.peer_id) -> pb.AdmitRequest:
    return shown(accept(text, peer_id=None, now=NOW), server, bearer)


def test_a_token_brings_all_it_takes_to_join() -> None:
    key = SwarmKey(bytes(range(32)))
    text = issue(ISSUER, expires_at=NOW + WEEK, addrs=["/ip4/1.2.3.4/tcp/1/p2p/x"], swarm_key=key)
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
    way_in = find_way_in((), None, f" {text}\n", peer_id=ALICE, now=NOW)
    assert way_in.initial_peers == ("/ip4/1.2.3.4/tcp/1/p2p/x",)
    assert way_in.swarm_key == key
    assert way_in.token is not None
    assert key.secret not in shown(way_in.token, SERVER.peer_id, ALICE).SerializeToString(), "servers are not shown it"
    for secret in (key.secret, way_in.token.holder_key):
        assert not shows(repr(way_in), secret)
        assert shows(repr([b"before" + secret + b"after"]), secret), "it would be seen"
    assert find_way_in(("/elsewhere",), None, text, now=NOW).initial_peers == ("/elsewhere",)


def shows(text: str, secret: bytes) -> bool:
    """Whether the 32 bytes that differ from key to key are in `text`, however written."""
    seed = secret[-32:]
    written = (repr(seed)[2:-1], seed.hex(), base64.b64encode(seed[:30]).decode())
    return any(bare(form) in bare(text) for form in written)


def bare(text: str) -> str:
    """Without what `repr` escapes in one way or another."""
    return re.sub(r"[\\'\"]", "", text)


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_changed_token_is_none(place: int, bit: int) -> None:
    data = bytearray(base64.urlsafe_b64decode(TOKEN + "=" * (-len(TOKEN) % 4)))
    data[place % len(data)] ^= 1 << bit
    try:
        token = accept(base64.urlsafe_b64encode(data).decode().rstrip("="), peer_id=None, now=NOW)
    except UserError:
        return
    # What is not signed is the token's own key, which then proves nothing.
    with pytest.raises(NotAdmitted):
        a_server().admit(ALICE, shown(token, SERVER.peer_id, ALICE))


TOKEN = issue(ISSUER, expires_at=NOW + WEEK)


@given(text=st.text(string.printable, max_size=60))
def test_what_is_no_token_is_the_users_mistake(text: str) -> None:
    with pytest.raises(UserError, match="--invitation: "):
        accept(text, peer_id=None, now=NOW)


def test_the_first_to_come_is_bound() -> None:
    server = a_server()
    assert not server.admits(ALICE)
    assert server.admit(ALICE, request(TOKEN, ALICE)) == NOW + WEEK
    assert server.admits(ALICE)
    assert server.admit(ALICE, request(TOKEN, ALICE)) == NOW + WEEK, "again, on the next connection"
    with pytest.raises(NotAdmitted, match="used up"):
        server.admit(BOB, request(TOKEN, BOB))
    assert not server.admits(BOB)
    assert a_server().admit(BOB, request(TOKEN, BOB)), "every server counts for itself, and a restart forgets"


def test_as_many_uses_as_were_said() -> None:
    server, text = a_server(), issue(ISSUER, expires_at=NOW + WEEK, uses=2)
    for peer in (ALICE, BOB, ALICE):
        server.admit(peer, request(text, peer))
    carol = create_identity().peer_id
    with pytest.raises(NotAdmitted, match="used up"):
        server.admit(carol, request(text, carol))


def test_a_server_that_was_shown_it_can_not_use_it_elsewhere() -> None:
    seen = request(TOKEN, ALICE, server=OTHER_SERVER.peer_id)
    for thief in (ALICE, BOB, OTHER_SERVER.peer_id):
        with pytest.raises(NotAdmitted, match="does not hold it"):
            a_server().admit(thief, seen)


def test_a_named_bearer_needs_no_proof_and_nobody_else_is_it() -> None:
    server, text = a_server(), issue(ISSUER, expires_at=NOW + WEEK, bearer=ALICE)
    with pytest.raises(UserError, match=f"is for {ALICE}"):
        accept(text, peer_id=BOB, now=NOW)
    with pytest.raises(NotAdmitted, match=f"is for {ALICE}, not {BOB}"):
        server.admit(BOB, request(text, BOB))
    server.admit(ALICE, request(text, ALICE))
    assert (server.admits(ALICE), server.admits(BOB)) == (True, False)


def test_it_ends() -> None:
    clock = Clock()
    server = a_server(clock=clock)
    asked = request(TOKEN, ALICE)
    server.admit(ALICE, asked)
    clock.now = NOW + WEEK
    assert not server.admits(ALICE)
    with pytest.raises(NotAdmitted, match="expired"):
        server.admit(ALICE, asked)
    with pytest.raises(UserError, match="expired"):
        accept(TOKEN, peer_id=ALICE, now=clock.now)


def test_whose_word_counts() -> None:
    own = issue(SERVER, expires_at=NOW + WEEK)
    a_server(allowed=frozenset(), invited_by=None).admit(ALICE, request(own, ALICE))
    stranger = issue(OTHER_SERVER, expires_at=NOW + WEEK)
    with pytest.raises(NotAdmitted, match="does not know the issuer"):
        a_server().admit(ALICE, request(stranger, ALICE))
    for digest, is_ours in ((DIGEST, True), ("cd" * 32, False)):
        scoped = request(issue(ISSUER, expires_at=NOW + WEEK, model_digest=digest), ALICE)
        if is_ours:
            a_server().admit(ALICE, scoped)
        else:
            with pytest.raises(NotAdmitted, match="another model"):
                a_server().admit(ALICE, scoped)


def test_who_needs_none_is_told_so() -> None:
    assert a_server(invited_by=None).admits(BOB), "a server without lists is for everybody"
    listed = a_server(allowed=frozenset({BOB}))
    assert listed.admits(BOB)
    assert listed.admit(BOB, pb.AdmitRequest()) == 0.0
    with pytest.raises(ProtocolViolation):
        listed.admit(ALICE, pb.AdmitRequest())


def test_what_is_remembered_is_bounded_and_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_INVITATIONS", 2)
    clock = Clock()
    server = a_server(clock=clock)
    texts = [issue(ISSUER, expires_at=NOW + days * 86400) for days in (1, 2, 3)]
    for text in texts[:2]:
        server.admit(ALICE, request(text, ALICE))
    with pytest.raises(NotAdmitted, match="invited here already"):
        server.admit(BOB, request(texts[2], BOB))
    clock.now += 1.5 * 86400
    server.admit(BOB, request(texts[2], BOB))


def test_from_pretrained_passes_it_on() -> None:
    config = ClientConfig(swarm_key="swarm.key", invitation=TOKEN, identity="my.key").peer_config()
    assert config.swarm_key == Path("swarm.key")
    assert config.identity == Path("my.key")
    assert (config.invitation, config.initial_peers) == (TOKEN, ())
    assert TOKEN not in repr(config)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"bearer": ALICE, "uses": 2}, "no other uses"),
        ({"uses": 0}, "--uses"),
        ({"model_digest": "SmolLM2"}, "64 hex digits"),
        ({"addrs": ["x"] * 17}, "16 addresses"),
    ],
)
def test_invitations_that_can_not_be(settings: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        issue(ISSUER, expires_at=NOW, **settings)  # type: ignore[arg-type]
