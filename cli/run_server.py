"""`python -m petals.cli.run_server`: the server under the spellings that Petals users know."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from petals.cli.main import main, underscored

SPELLINGS = {
    "--block_indices": "--serve",
    "--host_maddrs": "--listen",
    "--identity_path": "--identity",
    "--announce_maddrs": "--announce",
}


def translate_flags(argv: Sequence[str]) -> list[str]:
    """Petals' flags as ours, values unchanged."""
    words: list[str] = []
    for word in map(underscored, argv):
        flag, equals, value = word.partition("=")
        words.append(SPELLINGS.get(flag, flag) + equals + value)
    return words


def server_words(argv: Sequence[str]) -> list[str]:
    """The words of `petals peer`; a server that is not told which blocks, nor how many, holds what fits."""
    words = translate_flags(argv)
    chosen = {"--serve", "--num_blocks", "--help", "-h"} & {word.partition("=")[0] for word in words}
    return words if chosen else [*words, "--serve"]


if __name__ == "__main__":
    main(["peer", *server_words(sys.argv[1:])])
