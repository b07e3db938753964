"""`python -m petals.cli.run_server`: the server under the spellings that Petals users know."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from petals.cli.main import complain, main
from petals.cli.old_flags import NewCommand, new_command
from petals.protocols.errors import UserError


def run_server(argv: Sequence[str]) -> None:
    """Run `petals peer --serve` for an old command line; ends the process with its exit code."""
    command = translated(argv)
    if command.measure_only:
        main(["bench", *command.bench_words()])
    # A server that is not told which blocks, nor how many, holds what fits.
    main(["peer", *command.peer_words()], {"serve": range(0), "serve_settings": command.serve})


def translated(argv: Sequence[str]) -> NewCommand:
    """The command in our spelling, its notes printed and its environment set; exits where a flag is refused."""
    try:
        command = new_command(argv)
    except UserError as error:
        sys.exit(complain(error))
    for note in command.notes:
        print(f"petals: {note}", file=sys.stderr)
    os.environ.update(command.environment)
    return command


if __name__ == "__main__":
    run_server(sys.argv[1:])
