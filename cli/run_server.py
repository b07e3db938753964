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


if __name__ == "__main__":
    # A server that is not told which blocks, nor how many, holds what fits.
    main(["peer", *translate_flags(sys.argv[1:])], {"serve": range(0)})
