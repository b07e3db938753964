"""Keys: made once, kept private, read in libp2p's encoding, and refused in one line."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.secp256k1 import create_new_key_pair as new_secp256k1

from petals.peer.base.identity import (
    Identity,
    IdentityError,
    create_identity,
    load_identity,
    load_or_create_identity,
    verify,
)
from petals.protocols.types import PeerId

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rsa() -> Identity:
    return create_identity(key_type="rsa")


def test_a_key_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "peer.key"
    made = load_or_create_identity(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_identity(path).peer_id == made.peer_id == load_identity(path).peer_id
    before = path.read_bytes()
    with pytest.raises(IdentityError, match="exists already"):
        create_identity(path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["peer.key"]  # no draft left behind


def test_rsa_keys_are_as_good(tmp_path: Path, rsa: Identity) -> None:
    path = tmp_path / "rsa.key"
    path.write_bytes(rsa.key_pair.private_key.serialize())
    assert load_identity(path).peer_id == rsa.peer_id
    assert rsa.peer_id.startswith("Qm")


def test_signatures_hold_for_their_peer_and_words_only(rsa: Identity) -> None:
    other = create_identity()
    for me in (create_identity(), rsa):
        signature = me.sign(b"words")
        assert verify(me.peer_id, me.public_key, b"words", signature)
        assert not verify(me.peer_id, me.public_key, b"other words", signature)
        assert not verify(other.peer_id, me.public_key, b"words", signature)
        assert not verify(me.peer_id, other.public_key, b"words", other.sign(b"words"))
        assert not verify(me.peer_id, me.public_key, b"words", b"")


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_garbage_never_verifies_and_never_raises(key: bytes, signature: bytes) -> None:
    assert not verify(PeerId("12D3KooW"), key, b"words", signature)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x01\x12\x40" + b"\0" * 10, b"\0" * 100_000])
def test_a_file_without_a_key_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.key"
    path.write_bytes(content)
    for read in (load_identity, load_or_create_identity):
        with pytest.raises(IdentityError) as refused:
            read(path)
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)


def test_other_refusals(tmp_path: Path) -> None:
    path = tmp_path / "other.key"
    path.write_bytes(new_secp256k1().private_key.serialize())
    with pytest.raises(IdentityError, match="no Ed25519 or RSA"):
        load_identity(path)
    with pytest.raises(IdentityError, match="can not read"):
        load_identity(tmp_path)
    with pytest.raises(IdentityError, match="can not write"):
        create_identity(path / "below-a-file.key")
    with pytest.raises(IdentityError, match="key type"):
        create_identity(key_type="dsa")


def test_the_key_is_never_shown() -> None:
    me = create_identity()
    secret = me.key_pair.private_key.to_bytes()
    assert me.peer_id in repr(me)
    assert secret.hex() not in repr(me)
    assert repr(secret) not in repr(me)
    assert "key_pair" not in repr(me)


def test_the_public_test_identities_are_what_their_readme_says() -> None:
    readme = (ROOT / "identities" / "README.md").read_text()
    assert "Never use them" in readme
    for number in range(1, 5):
        assert load_identity(ROOT / "identities" / f"local-{number}.key").peer_id in readme
