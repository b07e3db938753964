"""Takes the pictures of docs/images/: the chat page and the swarm's, light and dark, on a desktop and on a phone.

    python scripts/screenshots.py [DIRECTORY]

Two servers with half of the default model each, a door, and headless Chromium, all on this machine.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import trio

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.gateway.browser import Page, open_page  # noqa: E402

PETALS = (sys.executable, "-m", "petals.cli.main", "peer", "--listen", "/ip4/127.0.0.1/tcp/0", "--no_mdns", "--json")
QUESTION = "Why is the sky blue? Answer in a few sentences."
SIZES = {"": (1280, 800), "-phone": (390, 844)}


@contextmanager
def peer(*words: str) -> Iterator[dict[str, Any]]:
    """A peer as a process; yields what it says of itself."""
    process = subprocess.Popen([*PETALS, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


async def shoot(page: Page, name: str, folder: Path) -> None:
    """One page in all sizes and colours."""
    for size, (width, height) in SIZES.items():
        for dark in (False, True):
            await page.look(width=width, height=height, dark=dark)
            await trio.sleep(0.5)  # plots are drawn again
            await page.shoot(folder / f"{name}{size}{'-dark' if dark else ''}.png")


async def take(url: str, folder: Path, profile: Path) -> None:
    """Ask something, and take all pictures."""
    async with open_page(profile) as page:
        await page.look()
        await page.go(url)
        await page.until("document.querySelector('#model').value")
        await page.type(QUESTION)
        await page.press("Enter")
        await page.until("document.querySelector('#messages .assistant:last-child .body')?.textContent.length > 400")
        await page.click("#stop")
        await page.until("!document.querySelector('#send').hidden")
        await shoot(page, "chat", folder)
        await page.look()
        await page.go(url + "/swarm")
        await page.until("document.querySelector('main').innerText.includes('0:15')")
        await trio.sleep(12)  # so that the plots have something to show
        await shoot(page, "swarm", folder)


def main() -> None:
    """Start everything, take the pictures, stop everything."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, ExitStack() as stack:
        first = stack.enter_context(peer("--serve", "0:15", "--new_swarm", "--public_name", "attic"))
        joining = ("--initial_peers", first["addrs"][0])
        stack.enter_context(peer("--serve", "15:30", *joining, "--public_name", "garage"))
        door = stack.enter_context(peer("--http", "127.0.0.1:0", *joining))
        trio.run(take, door["http"], folder, Path(profile))


if __name__ == "__main__":
    main()
