"""Lines for people, on stderr. A terminal overwrites a passing one with the next; elsewhere all are plain lines."""

from __future__ import annotations

import sys

from petals.models.progress import Passing

CLEAR_LINE = "\r\x1b[2K"


class _Terminal:
    """Whether its last line is a passing one. There is one terminal, so there is one of these."""

    passing = False


def say(line: str) -> None:
    """One line."""
    passing = isinstance(line, Passing) and sys.stderr.isatty()
    start = CLEAR_LINE if _Terminal.passing else ""
    _Terminal.passing = passing
    sys.stderr.write(f"{start}petals: {line}" + ("" if passing else "\n"))  # one write: threads may speak, too
    sys.stderr.flush()


def hush() -> None:
    """Take a passing line away, before something else is written to the terminal."""
    if _Terminal.passing:
        _Terminal.passing = False
        sys.stderr.write(CLEAR_LINE)
        sys.stderr.flush()
