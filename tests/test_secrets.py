"""Keys, tokens and API keys are in nothing that a peer says, however loud its loggers are, and whatever goes wrong."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import base58
from libp2p.crypto.ed25519 import create_new_key_pair

from petals.gateway.keys import create_key

ROOT = Path(__file__).parents[1]
TOKEN = "hf_ThisIsNoTokenOfAnybodyButItLooksLike1"


def forms(secret: bytes) -> Iterator[bytes]:
    """How bytes are written down: as they are, hexadecimal, base64 of all three alignments, base58, a repr, a list."""
    yield secret
    yield from (secret.hex().encode(), secret.hex().upper().encode(), repr(secret)[2:-1].encode())
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            inner = encode(bytes(shift) + secret)
            yield inner[4 if shift else 0 : len(inner) // 4 * 4 - 4]
    yield base58.b58encode(secret)
    yield str(list(secret))[1:-1].encode()


def test_every_form_is_found() -> None:
    secret = bytes(range(7, 39))
    said = b"... key=" + base64.b64encode(b"x" + secret + b"yz") + b" ..."
    assert any(form in said for form in forms(secret))
    assert not any(form in said for form in forms(bytes(range(107, 139))))


def test_nothing_a_peer_says_holds_a_secret(tmp_path: Path) -> None:
    secrets: dict[str, bytes] = {"token": TOKEN.encode()}
    for number, name in enumerate(("server", "client")):
        seed = bytes((17 * number + 31 * index + 5) % 251 for index in range(32))
        pair = create_new_key_pair(seed=seed)
        (tmp_path / f"{name}.key").write_bytes(pair.private_key.serialize())
        secrets |= {f"{name} seed": seed, f"{name} key": pair.private_key.to_bytes()}
    api_key = create_key(tmp_path / "api_keys", "me")
    (tmp_path / "api.key").write_text(api_key)
    secrets["API key"] = api_key.encode()
    secrets["API key's bits"] = base64.urlsafe_b64decode(api_key.removeprefix("petals-") + "=")
    environment = os.environ | {
        "LIBP2P_DEBUG": "DEBUG", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "secrets_child.py"), str(tmp_path), TOKEN],
        env=environment, capture_output=True, check=False, timeout=280,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:].decode(errors="replace")
    for witness in (
        b"200",
        b"401",
        b"the hub was told the token: True",
        b"DEBUG:",
        b"a bug, with PeerConfig(",
        b"libp2p",
    ):
        assert witness in said, f"{witness!r}: this run proves nothing"
    found = {name for name, secret in secrets.items() for form in forms(secret) if form in said}
    assert not found, f"in what a peer says: {found}"
