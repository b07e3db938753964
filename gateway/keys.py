"""API keys. The file holds hashes only: who reads it can not ask with it.

A line is the SHA-256 of a key in hex, what the key may ask (requests_per_minute=60 answers=2), and whom it is for, with
blanks between; only the hash must be there. A plain hash is enough for 256 random bits:
there is no dictionary to try.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from petals.protocols.errors import UserError

PREFIX = "petals-"
_LINE = re.compile(r"([0-9a-f]{64})((?:\s+(?:requests_per_minute|answers)=[0-9]{1,9})*)(\s.*)?")
_LIMIT = re.compile(r"(\w+)=([0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What stands beside a key's hash; None: no limit of its own."""

    requests_per_minute: int | None = None
    answers: int | None = None
    """Generated at once."""

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "answers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1")


def create_key(path: Path, name: str = "", limits: Limits | None = None) -> str:
    """Make a key, add its hash to `path`, and return the key, which is kept nowhere.

    Raises:
        UserError: the file can not be written, or holds something else.
    """
    if path.exists():
        load_keys(path)
    allowed = {each: getattr(limits, each) for each in ("requests_per_minute", "answers") if limits is not None}
    words = [f"{each}={value}" for each, value in allowed.items() if value is not None]
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(" ".join([hash_key(key), *words, *name.split()]) + "\n")
        path.chmod(0o600)
    except OSError as error:
        raise UserError(f"can not write {path}: {error.strerror}") from None
    return key


def load_keys(path: Path) -> dict[str, Limits]:
    """The hashes in a file and what each may ask; empty lines and those that begin with # are skipped.

    Raises:
        UserError: it can not be read, or a line is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can not read {path}: {getattr(error, 'strerror', None) or error}") from None
    keys = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            found = _LINE.fullmatch(line)
            if found is None:
                raise UserError(f"{path}, line {number}: no key hash; `petals keygen --api {path}` adds one")
            try:
                keys[found[1]] = Limits(**{name: int(value) for name, value in _LIMIT.findall(found[2])})
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    return keys


def hash_key(key: str) -> str:
    """As it stands in the file."""
    return hashlib.sha256(key.encode()).hexdigest()


def hash_of(authorization: str) -> str | None:
    """Of the key that an Authorization header brings. What is then looked up are hashes of what the asker sent: how
    long that takes says nothing about ours."""
    scheme, _, key = authorization.partition(" ")
    return hash_key(key.strip()) if scheme.lower() == "bearer" else None
