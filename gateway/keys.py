"""API keys. The file holds hashes only: who reads it can not ask with it.

A line is the SHA-256 of a key in hex and, after a blank, whom it is for. A plain hash is enough for 256 random bits:
there is no dictionary to try.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path

from petals.protocols.errors import UserError

PREFIX = "petals-"
_LINE = re.compile(r"([0-9a-f]{64})(\s.*)?")


def create_key(path: Path, name: str = "") -> str:
    """Make a key, add its hash to `path`, and return the key, which is kept nowhere.

    Raises:
        UserError: the file can not be written, or holds something else.
    """
    if path.exists():
        load_hashes(path)
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{hash_key(key)} {' '.join(name.split())}".rstrip() + "\n")
        path.chmod(0o600)
    except OSError as error:
        raise UserError(f"can not write {path}: {error.strerror}") from None
    return key


def load_hashes(path: Path) -> frozenset[str]:
    """The hashes in a file; empty lines and those that begin with # are skipped.

    Raises:
        UserError: it can not be read, or a line is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can not read {path}: {getattr(error, 'strerror', None) or error}") from None
    hashes = set()
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            found = _LINE.fullmatch(line)
            if found is None:
                raise UserError(f"{path}, line {number}: no key hash; `petals keygen --api {path}` adds one")
            hashes.add(found[1])
    return frozenset(hashes)


def hash_key(key: str) -> str:
    """As it stands in the file."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_known(authorization: str, hashes: frozenset[str]) -> bool:
    """Whether an Authorization header brings a key of ours. What is compared are hashes of what the asker sent: how
    long that takes says nothing about ours."""
    scheme, _, key = authorization.partition(" ")
    return scheme.lower() == "bearer" and hash_key(key.strip()) in hashes
