"""The swarm key's file: made once, copied to every peer of a private swarm. Never in a log, a repr or an error."""

from __future__ import annotations

import secrets
from pathlib import Path

from petals.peer.base.identity import warn_if_shared, write_private
from petals.peer.net.wire.pnet import KEY_BYTES, MAX_KEY_FILE_BYTES, SwarmKey, encode_swarm_key, parse_swarm_key
from petals.protocols.errors import UserError


def create_swarm_key(path: Path) -> SwarmKey:
    """A new key in a new file of mode 0600.

    Raises:
        UserError: the file exists or can not be written.
    """
    key = SwarmKey(secrets.token_bytes(KEY_BYTES))
    write_private(path, encode_swarm_key(key))
    return key


def load_swarm_key(path: Path | None) -> SwarmKey | None:
    """The key in `path`; None: a swarm that is open to everybody.

    Raises:
        UserError: it can not be read, or is no swarm key.
    """
    if path is None:
        return None
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_KEY_FILE_BYTES)
    except OSError as error:
        raise UserError(f"can not read the swarm key {path}: {error.strerror}") from None
    try:
        key = parse_swarm_key(data)
    except UserError as error:
        raise UserError(f"{path} holds {error}") from None
    warn_if_shared(path)
    return key
