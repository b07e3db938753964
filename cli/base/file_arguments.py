"""Arguments whose value may stand in a file: `@FILE`."""

from __future__ import annotations

from pathlib import Path

from petals.protocols.errors import UserError


def token_of(word: str | None) -> str | None:
    """An invitation as it is given; @FILE stands for the one in a file."""
    return read_argument(word[1:]) if word is not None and word.startswith("@") else word


def read_argument(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can not read {path}: {getattr(error, 'strerror', None) or error}") from None
