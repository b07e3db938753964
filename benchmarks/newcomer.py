"""A new user's path: from a clone to the first streamed word in a browser, by the quick start's own commands.

    python benchmarks/newcomer.py [--no_cache] [--question "Why is the sky blue?"]

Everything is new but pip's download cache and the model's (`--no_cache`: these too): clone, `scripts/setup`,
`petals peer --serve 0:30 --http 127.0.0.1:8000`, headless Chromium opens the page, types, and waits for the first text
of the answer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import trio

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from tests.gateway.browser import open_page  # noqa: E402

ANSWER = "document.querySelector('#messages .assistant:last-child .body')"
SERVE = ("peer", "--serve", "0:30", "--http", "127.0.0.1:0")


class Clock:
    """Says how long each step took, as a table."""

    def __init__(self) -> None:
        self.total_s = 0.0
        print("| step | seconds |\n|---|---|")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        self.total_s += took
        print(f"| {name} | {took:.1f} |", flush=True)


async def ask(url: str, question: str, profile: Path, clock: Clock) -> None:
    """In a browser, until the answer has its first text."""
    async with AsyncExitStack() as stack:
        with clock.step("browser and page"):
            page = await stack.enter_async_context(open_page(profile))
            await page.go(url)
            await page.until("document.querySelector('#model').value")
        with clock.step("question to first text"):
            await page.type(question)
            await page.press("Enter")
            await page.until(f"{ANSWER} && {ANSWER}.textContent.length > 0")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no_cache", action="store_true", help="download all packages and the model again")
    parser.add_argument("--question", default="Why is the sky blue?")
    options = parser.parse_args()
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        home, clone = Path(directory, "home"), Path(directory, "petals")
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        if options.no_cache:
            environment |= {"PIP_NO_CACHE_DIR": "1", "XDG_CACHE_HOME": str(home), "HF_HOME": str(home)}
        with clock.step("git clone"):
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        with clock.step("scripts/setup"):
            subprocess.run([clone / "scripts" / "setup"], env=environment, check=True, stderr=subprocess.DEVNULL)
        with clock.step("petals peer --serve 0:30 --http, until its page is there"):
            command = [clone / ".venv" / "bin" / "petals", *SERVE, "--json"]
            peer = subprocess.Popen(command, cwd=clone, env=environment, stdout=subprocess.PIPE, text=True)
            assert peer.stdout is not None
            peer.stdout.readline()  # the server
            url = json.loads(peer.stdout.readline())["http"]
        try:
            trio.run(ask, url, options.question, Path(directory, "profile"), clock)
        finally:
            peer.send_signal(signal.SIGTERM)
            peer.communicate(timeout=30)
    print(f"| all | {clock.total_s:.1f} |")


if __name__ == "__main__":
    main()
