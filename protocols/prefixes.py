"""Names for what a cache holds, so that a later session can ask whether it is still there.

A cache is a function of the tokens it was told. The name of a prefix is a hash of its token ids, one name for every
`PREFIX_TOKENS` tokens, each made from the one before: two sequences share names exactly as far as they share tokens.
Servers take names as they are; that a name stands for those tokens only the client knows, which is why caches are
looked up by whoever left them, unless the operator says that all clients trust each other.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from itertools import islice

PREFIX_TOKENS = 32
"""From one name to the next."""
NAME_BYTES = 32
MAX_PREFIXES = 512
"""Names in one message, 16 KiB, for 16,384 tokens; what lies behind them is not remembered."""


def prefix_names(token_ids: Sequence[int]) -> list[bytes]:
    """SHA-256 of (the name before, the next 32 ids as little-endian uint32), for every 32 whole tokens."""
    names: list[bytes] = []
    name = b""
    starts = range(0, len(token_ids) - PREFIX_TOKENS + 1, PREFIX_TOKENS)
    for start in islice(starts, MAX_PREFIXES):
        ids = struct.pack(f"<{PREFIX_TOKENS}I", *token_ids[start : start + PREFIX_TOKENS])
        name = hashlib.sha256(name + ids).digest()
        names.append(name)
    return names
