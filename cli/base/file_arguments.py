"""Arguments whose value may stand in a file: `@FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from petals.protocols.errors import UserError

SECRETS = ("--token", "--invitation", "--api_key")
"""Flags whose value nobody else should see."""


def token_of(word: str | None) -> str | None:
    """A token or an invitation as it is given; @FILE stands for the one in a file."""
    return read_argument(word[1:]).strip() if word is not None and word.startswith("@") else word


def exposed(words: Sequence[str]) -> list[str]:
    """Those of `SECRETS` whose value stands on the command line itself, where everybody on the machine can read it."""
    found = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, sign, value = word.partition("=")
        if flag in SECRETS and not (value if sign else following).startswith("@"):
            found.append(flag)
    return found


def read_argument(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can not read {path}: {getattr(error, 'strerror', None) or error}") from None
