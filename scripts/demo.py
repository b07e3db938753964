"""Three processes: two peers with half of the blocks each, one that asks. Ends them all, whatever happens."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import ExitStack

PETALS = [sys.executable, "-m", "petals.cli.main", "peer"]


def start(stack: ExitStack, *flags: str) -> dict[str, object]:
    """Start a serving peer; return what it says once it serves."""
    process = subprocess.Popen([*PETALS, *flags, "--json"], stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.send_signal, signal.SIGTERM)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(process.wait() or 1)
    described: dict[str, object] = json.loads(line)
    return described


def main() -> None:
    """Run the demonstration."""
    prompt = " ".join(sys.argv[1:]) or "A cat sat on"
    subprocess.run([sys.executable, "-m", "petals.models.source.hub"], check=True)
    with ExitStack() as stack:
        first = start(stack, "--serve", "0:15", "--new_swarm", "--identity", "identities/local-1.key")
        addrs = [str(addr) for addr in first["addrs"]]  # type: ignore[attr-defined]
        start(stack, "--serve", "15:30", "--initial_peers", *addrs, "--identity", "identities/local-2.key")
        print("\nThe third peer asks; its words are computed by the other two:\n", file=sys.stderr, flush=True)
        asked = subprocess.run(
            [*PETALS, "--generate", prompt, "--max_new_tokens", "64", "--initial_peers", *addrs], check=False
        )
    sys.exit(asked.returncode)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
