"""`python -m petals.cli.healthcheck`: does a peer on this machine answer? For health checks: no imports but Python's
own.

A connection alone would say little: the system accepts it for a process that hangs. So we say what every libp2p dialler
says first, and wait for the first byte of the answer, which only a running loop sends.
"""

from __future__ import annotations

import os
import re
import socket
import sys

HELLO = b"\x13/multistream/1.0.0\n"
WITHIN_S = 10.0
DEFAULT_PORT = 31337
_TCP = re.compile(r"/tcp/([0-9]{1,5})\b")


def port_of(listen: str) -> int:
    """The first TCP port among multiaddrs, as in $PETALS_LISTEN."""
    found = _TCP.search(listen)
    return int(found[1]) if found else DEFAULT_PORT


def answers(port: int, within_s: float = WITHIN_S) -> bool:
    """Whether a libp2p peer on this machine answers at `port`."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=within_s) as connection:
            connection.sendall(HELLO)
            return bool(connection.recv(1))
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(not answers(int(sys.argv[1]) if len(sys.argv) > 1 else port_of(os.environ.get("PETALS_LISTEN", ""))))
