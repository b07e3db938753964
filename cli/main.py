"""`petals`: argv -> settings -> one trio.run(). Verbs live in files of their own and are imported when asked for."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from petals import __version__
from petals.cli import keygen, peer, seal, status
from petals.protocols.errors import SwarmError, UserError

if TYPE_CHECKING:
    import trio
    from trio_typing import TaskStatus

EXIT_MISTAKE = 2
"""What the user asked for can not be; one line on stderr said why."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `petals` command; ends the process with its exit code."""
    sys.exit(run(parse(sys.argv[1:] if argv is None else argv)))


class Parser(argparse.ArgumentParser):
    """Complains in one line, like everything else here."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_MISTAKE, f"petals: {message} (see {self.prog} --help)\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; prints help or a one-line complaint and exits where it must."""
    parser = Parser(
        prog="petals",
        description="Run language models together: each peer holds some of the blocks.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"petals {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in (peer, status, keygen, seal):
        verb.add_parser(verbs)
    return parser.parse_args([underscored(word) for word in argv])


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
    try:
        if options.synchronous:
            options.run(options)
        else:
            run_async(partial(options.run, options))
    except SwarmError as error:
        return complain(error)
    except Exception as error:
        if type(error).__module__ != "petals.models.errors":  # known by name: torch is not imported for it
            raise
        return complain(error)
    except KeyboardInterrupt:  # before trio was listening
        pass
    return 0


def run_async(verb: Callable[[], Awaitable[None]]) -> None:
    """Run `verb` in trio until it ends or a signal comes: the first Ctrl-C or SIGTERM ends it cleanly."""
    import trio

    async def until_signalled() -> None:
        failures: list[Exception] = []
        async with trio.open_nursery() as nursery:
            await nursery.start(_cancel_on_signal, nursery.cancel_scope)
            try:
                await verb()
            except Exception as error:  # kept, not handled: raised below, outside of the nursery's group
                failures.append(error)
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]

    trio.run(until_signalled)


async def _cancel_on_signal(scope: trio.CancelScope, *, task_status: TaskStatus[None]) -> None:
    import trio

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()
            return  # the handlers are Python's own again: a second Ctrl-C does not ask


def complain(error: Exception) -> int:
    """One line on stderr: what was wrong, and what to do."""
    kind = "" if isinstance(error, UserError) or not isinstance(error, SwarmError) else f"{type(error).__name__}: "
    print(f"petals: {kind}{' '.join(str(error).split())}", file=sys.stderr)
    return EXIT_MISTAKE


if __name__ == "__main__":
    main()
