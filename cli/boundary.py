"""The edge of the command line: words that are no text, streams that can not show every character, signals, and errors
that nobody expected. Inside it the program may assume that all of these are somebody else's."""

from __future__ import annotations

import argparse
import io
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

from petals import __version__
from petals.cli.base.terminal import hush
from petals.protocols.errors import UserError

EXIT_BUG = 1
"""An error that is none of the user's mistakes."""
EXIT_PIPE = 128 + 13
"""As a shell reports a program that SIGPIPE ended: whoever read our output has left."""


def show_anything() -> None:
    """Characters that a stream has no byte for are written as escapes, instead of losing the work that led to them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def check_text(options: argparse.Namespace) -> None:
    """
    Raises:
        UserError: an argument with bytes that are no UTF-8; names the flag. Paths may have any bytes.
    """
    for name, value in vars(options).items():
        for text in _texts(value):
            try:
                text.encode()
            except UnicodeEncodeError:
                shown = text.encode(errors="surrogateescape")
                flag = name.upper() if name == "model" else f"--{name}"
                raise UserError(f"{flag}: {shown!r} is no UTF-8 text; check the terminal's encoding") from None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        yield from (each for each in value if isinstance(each, str))


def report_bug(error: BaseException) -> int:
    """One line on stderr; the traceback, and what a report of the error needs, in a file that the line names.

    Returns: the exit code.
    """
    hush()
    if _is_broken_pipe(error):
        # Python would complain once more when it flushes the stream at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_PIPE
    first = error
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    said = " ".join(str(first).split())[:300]
    print(f"petals: unexpected {type(first).__name__}: {said or 'no more is known'}; {_kept(error)}", file=sys.stderr)
    return EXIT_BUG


def _is_broken_pipe(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_broken_pipe, error.exceptions))
    return isinstance(error, BrokenPipeError)


def _kept(error: BaseException) -> str:
    """Where the details are."""
    about = f"petals {__version__}, Python {platform.python_version()}, {platform.platform()}\n\n"
    details = about + "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="petals-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(details)
    except OSError:
        sys.stderr.write(details)
        return "please report it with the lines above"
    return f"please report it with {file.name}"
