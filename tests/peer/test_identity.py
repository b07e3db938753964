"""Who a peer is: key files as libp2p writes them, and nothing of the key anywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from libp2p.crypto.secp256k1 import create_new_key_pair as new_secp256k1

from petals.peer.identity import IdentityError, create_identity, load_identity, load_or_create_identity, verify
from petals.protocols.types import PeerId

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("key_type", "prefix"), [("ed25519", "12D3Koo"), ("rsa", "Qm")])
def test_a_key_file_gives_the_same_name_again(tmp_path: Path, key_type: str, prefix: str) -> None:
    path = tmp_path / "keys" / "peer.key"
    made = create_identity(path, key_type)
    again = load_or_create_identity(path)
    assert again.peer_id == made.peer_id
    assert made.peer_id.startswith(prefix)
    assert path.stat().st_mode & 0o777 == 0o600
    signature = again.sign(b"words")
    assert verify(made.peer_id, made.public_key, b"words", signature)
    assert not verify(made.peer_id, made.public_key, b"other words", signature)
    assert not verify(create_identity().peer_id, made.public_key, b"words", signature)
    assert not verify(PeerId("nonsense"), b"\xff" * 9, b"words", signature)


def test_the_public_test_keys_are_what_their_page_says() -> None:
    page = (ROOT / "identities" / "README.md").read_text()
    for path in sorted((ROOT / "identities").glob("local-*.key")):
        assert f"| `{path.name}` | `{load_identity(path).peer_id}` |" in page


def test_a_key_never_shows() -> None:
    identity = create_identity()
    secret = identity.key_pair.private_key.to_bytes()
    assert secret.hex() not in repr(identity)
    assert repr(secret)[2:-1] not in repr(identity)


@pytest.mark.parametrize("content", [b"", b"\x08\x01\x12\x40" + bytes(3), b"-----BEGIN PRIVATE KEY-----", bytes(20000)])
def test_what_is_no_key_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.key"
    path.write_bytes(content)
    with pytest.raises(IdentityError, match="holds no Ed25519 or RSA private key") as caught:
        load_identity(path)
    assert "\n" not in str(caught.value)


def test_other_kinds_of_keys_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "secp.key"
    path.write_bytes(new_secp256k1().private_key.serialize())
    with pytest.raises(IdentityError, match="Ed25519 or RSA"):
        load_identity(path)
    with pytest.raises(IdentityError, match="can not read"):
        load_identity(tmp_path / "nowhere.key")
    with pytest.raises(IdentityError, match="not overwritten"):
        create_identity(path)
