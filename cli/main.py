"""`petals`: argv -> settings -> one trio.run(). Verbs live in files of their own and are imported when asked for."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from petals import __version__
from petals.cli import bench, invite, keygen, peer, seal, settings
from petals.cli.base.config_flags import in_flags
from petals.cli.base.file_arguments import exposed
from petals.cli.base.help_format import Formatter
from petals.cli.base.terminal import hush
from petals.cli.boundary import check_text, report_bug, show_anything
from petals.cli.cores import honour_quota, yield_idle_cores
from petals.cli.doctor import doctor
from petals.cli.status import status
from petals.errors import PetalsError
from petals.protocols.errors import ConfigError, NeverFits, SwarmError, UserError

if TYPE_CHECKING:
    import trio
    from trio_typing import TaskStatus

EXIT_MISTAKE = 2
"""What the user asked for can not be; one line on stderr said why."""
START = """
to begin with:
  petals peer --serve 0:30 --http     a small model that answers in your browser, on http://127.0.0.1:8000
  petals VERB --help                  what a verb does and takes, with examples
"""


def main(argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None) -> None:
    """Entry point of the `petals` command; ends the process with its exit code. `defaults`: of flags nobody gives."""
    honour_quota(os.environ)
    yield_idle_cores(os.environ)
    show_anything()
    sys.exit(run(parse(sys.argv[1:] if argv is None else argv, defaults)))


class Parser(argparse.ArgumentParser):
    """Complains in one line, like everything else here."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_MISTAKE, f"petals: {message} (see {self.prog} --help)\n")


def parse(argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """Parse the command line, with what the environment and a file say where it is silent; prints help or a one-line
    complaint and exits where it must."""
    parser, verbs = parsers()
    words = [underscored(word) for word in argv]
    if words and words[0] in verbs and not {"-h", "--help"} & set(words):
        verbs[words[0]].set_defaults(**(defaults or {}))
        try:
            for complaint in settings.apply(verbs, words[0], words[1:], os.environ):
                print(f"petals: {complaint}", file=sys.stderr)
        except UserError as error:
            sys.exit(complain(error))
    elif not words:
        parser.error(f"what shall it do? The verbs are {', '.join(verbs)}; petals peer --serve 0:30 --http is a start")
    elif words[0] not in (*verbs, *(own := _flags_of(parser))):
        flag = "--" + words[0].lstrip("-")
        hint = (
            f", did you mean petals peer {flag}?"
            if flag in _flags_of(verbs["peer"])
            else _like(words[0], (*verbs, *own))
        )
        parser.error(f"there is no {words[0]!r}{hint} The verbs are {', '.join(verbs)}")
    options, unknown = parser.parse_known_args(words)
    for flag in exposed(words):
        variable = f"PETALS_{flag[2:].upper()}"
        print(
            f"petals: others on this machine can read {flag} (ps shows it); {flag} @FILE or {variable} keeps it",
            file=sys.stderr,
        )
    if unknown:
        verb = verbs[words[0]]
        verb.error(" ".join(f"there is no {word}{_like(word, _flags_of(verb))}" for word in unknown))
    return options


def _flags_of(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]


def _like(word: str, known: Iterable[str]) -> str:
    """The known word that is nearest to a mistyped one, as a question."""
    near = difflib.get_close_matches(word.partition("=")[0], list(known), n=1, cutoff=0.75)
    return f", did you mean {near[0]}?" if near else "."


def parsers() -> tuple[Parser, Mapping[str, argparse.ArgumentParser]]:
    """The whole command line, and its verbs."""
    parser = Parser(
        prog="petals",
        description="Run language models together: each peer holds some of the blocks.",
        epilog=START,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"petals {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in (peer, status, doctor, bench, keygen, invite, seal):
        verb.add_parser(verbs)
    for name, each in verbs.choices.items():
        settings.add_config_flag(each, name)
    return parser, verbs.choices


def underscored(word: str) -> str:
    """`--max-new-tokens` and `--max_new_tokens` are the same flag."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def run(options: argparse.Namespace) -> int:
    """Run one parsed verb and return the exit code."""
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for noisy in ("libp2p", "kademlia", "asyncio", "trio-websocket"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # their failed attempts are our view's business
    code: int | None = None
    stopped_by: int | None = None
    try:
        check_text(options)
        if options.synchronous:
            code = options.run(options)
        else:
            code, stopped_by = run_async(partial(options.run, options))
    except PetalsError as error:
        return complain(error)
    except Exception as error:
        return report_bug(error)
    except KeyboardInterrupt:  # before trio was listening
        stopped_by = signal.SIGINT
    if code is None and stopped_by is not None and not lasts(options):
        return 128 + stopped_by  # as a shell reports it: what was asked for has not been done
    return code or 0


def lasts(options: argparse.Namespace) -> bool:
    """Whether the verb goes on until it is stopped, so that stopping it is no failure."""
    return bool(options.lasts(options)) if "lasts" in options else False


def run_async(verb: Callable[[], Awaitable[int | None]]) -> tuple[int | None, int | None]:
    """Run `verb` in trio until it ends or a signal comes: the first Ctrl-C or SIGTERM ends it cleanly.

    Returns: the exit code it wants, None where it has no opinion; the number of the signal that cut it off.
    """
    import trio

    signals: list[int] = []

    async def until_signalled() -> tuple[int | None, int | None]:
        code: int | None = None
        failures: list[Exception] = []
        async with trio.open_nursery() as nursery:
            await nursery.start(_cancel_on_signal, nursery.cancel_scope, signals)
            try:
                code = await verb()
            except Exception as error:  # kept, not handled: raised below, outside of the nursery's group
                failures.append(error)
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]
        return code, signals[0] if signals else None

    return trio.run(until_signalled)


async def _cancel_on_signal(scope: trio.CancelScope, came: list[int], *, task_status: TaskStatus[None]) -> None:
    import trio

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            came.append(number)
            scope.cancel()
            return  # the handlers are Python's own again: a second Ctrl-C does not ask


def complain(error: Exception) -> int:
    """One line on stderr: what was wrong, and what to do."""
    hush()
    said_by_itself = isinstance(error, UserError | NeverFits) or not isinstance(error, SwarmError)
    kind = "" if said_by_itself else f"{type(error).__name__}: "
    text = in_flags(error) if isinstance(error, ConfigError) else str(error)
    print(f"petals: {kind}{' '.join(text.split())}", file=sys.stderr)
    return EXIT_MISTAKE


if __name__ == "__main__":
    main()
