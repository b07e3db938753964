"""The pages in a real browser: what people do, and what must not happen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from petals.gateway.config import HttpConfig
from petals.gateway.keys import create_key
from petals.gateway.server import open_gateway
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.client.generation.prompts import Chat
from tests.gateway.browser import CHROMIUM, Page, open_page
from tests.gateway.conftest import NAME, OpenDoor
from tests.swarm.conftest import Swarm, all_leases_returned

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")

ANSWER = "document.querySelector('#messages .assistant:last-child .body')"
IDLE = "!document.querySelector('#send').hidden"
HARMLESS = set("a br button code div h3 li p pre span strong table tbody td th thead tr ul".split())  # noqa: SIM905
HOSTILE = """# <b>Title</b>
<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>
[click](javascript:document.title='owned') [fine](https://example.org/a) **bold** and `<i>code</i>`
```html
<script>document.title='owned'</script>
```
| <u>a</u> | b |
|---|---|
| <svg onload="document.title='owned'"> | 2 |
- one
  - two
"""


@asynccontextmanager
async def visiting(url: str, profile: Path) -> AsyncIterator[Page]:
    """The chat page, ready to be asked. Nothing on it may complain, not even the content policy."""
    async with open_page(profile) as page:
        await page.look()
        await page.go(url)
        await page.until("document.querySelector('#model').value")
        yield page
        assert page.complaints == []


async def settle(page: Page, **settings: str) -> None:
    """Greedy answers of a length that is known."""
    chosen = {"temperature": "0", "frequency_penalty": "0", "top_p": "1", **settings}
    await page.js(f"localStorage.setItem('petals.settings', {json.dumps(json.dumps(chosen))})")


async def test_a_conversation(open_door: OpenDoor, tmp_path: Path) -> None:
    async with open_door() as door, visiting(door.url, tmp_path) as page:
        await settle(page, max_tokens="24")
        await page.go(door.url)
        await page.until("document.querySelector('#model').value")
        assert await page.js("document.activeElement.id") == "prompt"

        await page.type("Name three colours.")
        await page.press("Enter")
        await page.until(f"{ANSWER} && {ANSWER}.textContent.length > 3")
        assert await page.js("!document.querySelector('#stop').hidden"), "it streams: text is there before the end"
        await page.until(IDLE)
        body = {"model": NAME, "messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 24}
        expected = (await door.post("/v1/chat/completions", body)).json()["choices"][0]["message"]["content"]
        kept = "JSON.parse(localStorage['petals.chats']).chats[0].messages"
        assert (await page.js(kept))[1]["content"] == expected
        assert "tokens/s" in await page.js("document.querySelector('#speed').textContent")
        assert door.server.peer_id[-6:] in await page.js("document.querySelector('#route').textContent")
        assert "Answer:" in await page.js("document.querySelector('#announce').textContent")

        await page.go(door.url)  # a reload keeps the history
        assert "Name three colours." in await page.js("document.querySelector('#messages').textContent")
        assert await page.js("document.querySelector('#chats .name').textContent") == "Name three colours."
        await page.until("document.querySelector('#model').value")

        before = await page.js("document.querySelector('#messages .told').textContent")
        await page.js("[...document.querySelectorAll('.assistant .acts button')].at(-1).click()")
        await page.until(f"{IDLE} && document.querySelector('#messages .told').textContent !== {json.dumps(before)}")
        assert (await page.js(kept))[1]["content"] == expected, "greedy says the same again"

        await page.js("document.querySelector('.user .acts button').click()")
        await page.js("document.querySelector('.edit textarea').value = 'Name three animals.'")
        await page.press("Enter")
        await page.until(f"{IDLE} && {ANSWER} && {ANSWER}.textContent")
        told = await page.js(kept)
        assert told[0]["content"] == "Name three animals."
        assert len(told) == 2

        await page.click("#new")
        await page.until("!document.querySelector('#welcome').hidden")
        assert len(await page.js("JSON.parse(localStorage['petals.chats']).chats")) == 1


async def test_stop_ends_the_answer_at_the_servers(open_door: OpenDoor, tmp_path: Path) -> None:
    async with open_door() as door, visiting(door.url, tmp_path) as page:
        await settle(page, max_tokens="1000")
        await page.go(door.url)
        await page.until("document.querySelector('#model').value")
        await page.type("Tell me a long story.")
        await page.click("#send")
        await page.until(f"{ANSWER} && {ANSWER}.textContent.length > 10")
        assert door.server.server.inbound.sessions == 1
        await page.click("#stop")
        await page.until(IDLE)
        await all_leases_returned(door.server)
        assert "stopped" in await page.js("document.querySelector('#messages .told').textContent")
        assert len(await page.js(f"{ANSWER}.textContent")) > 10, "what was said stays"


async def test_what_a_model_says_stays_text(open_door: OpenDoor, tmp_path: Path) -> None:
    async with open_door() as door, visiting(door.url, tmp_path) as page:
        chat = {
            "now": "a",
            "chats": [
                {"id": "a", "title": "<b>x</b>", "touched": 1, "messages": [{"role": "user", "content": HOSTILE}]}
            ],
        }
        chat["chats"][0]["messages"].append({"role": "assistant", "content": HOSTILE})  # type: ignore[index]
        await page.js(f"localStorage.setItem('petals.chats', {json.dumps(json.dumps(chat))})")
        await page.go(door.url)
        await page.until(f"{ANSWER}.textContent.includes('onerror')")
        made = await page.js(f"[...{ANSWER}.querySelectorAll('*')].map(e => e.tagName.toLowerCase())")
        assert set(made) <= HARMLESS
        assert await page.js(f"[...{ANSWER}.querySelectorAll('a')].map(e => e.href)") == ["https://example.org/a"]
        assert await page.js(f"{ANSWER}.querySelector('pre').textContent") == "<script>document.title='owned'</script>"
        assert await page.js("document.querySelectorAll('#messages img, #messages script, #side b').length") == 0
        assert await page.js("document.title") == "<b>x</b> · Petals"


async def test_a_server_killed_in_the_middle(make_swarm: Callable[..., Swarm], tmp_path: Path) -> None:
    """The route moves to the other holder, and the answer is the one that would have been given."""
    swarm = make_swarm()
    asker = await swarm.add(range(15))
    first, second = [_serving(asker.addrs[0]) for _ in range(2)]
    try:
        addresses = [await trio.to_thread.run_sync(_first_line, each) for each in (first, second)]
        servers = {told["peer_id"]: process for told, process in zip(addresses, (first, second), strict=True)}
        client = await asker.client()
        with trio.fail_after(60):
            while len(client.watcher.view.offers) < 3:
                await client.watcher.changed(1.0)
        async with open_gateway(asker, HttpConfig(bind="127.0.0.1:0")) as url, visiting(url, tmp_path) as page:
            await settle(page, max_tokens="60")
            await page.go(url)
            await page.until("document.querySelector('#model').value")
            await page.type("Name three colours.")
            await page.press("Enter")
            hops = "[...document.querySelectorAll('#route .hop[title]')].map(e => e.title)"
            await page.until(f"{hops}.length === 2 && {ANSWER}.textContent.length > 10")
            lost = (await page.js(hops))[1]
            servers[lost].send_signal(signal.SIGKILL)
            await page.until("document.querySelector('#route .moved')")
            await page.until(IDLE)
            assert await page.js("document.querySelector('#messages .error')") is None
            now = (await page.js(hops))[1]
            assert {lost, now} == set(servers)
            said = await page.js("JSON.parse(localStorage['petals.chats']).chats[0].messages[1].content")
            question = Chat([{"role": "user", "content": "Name three colours."}])
            undisturbed = await asker.generate(question, options=GenerationOptions(max_new_tokens=60))
            assert said == "".join([token.text async for token in undisturbed])
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def _serving(addr: str) -> subprocess.Popen[str]:
    words = ["peer", "--serve", "15:30", "--initial_peers", addr, "--throughput", "100", "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "petals.cli.main", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _first_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())  # type: ignore[no-any-return]


async def test_the_swarm_page_names_the_weakest_stretch(open_door: OpenDoor, tmp_path: Path) -> None:
    async with open_door(range(10)) as door, visiting(door.url, tmp_path) as page:
        await page.go(f"{door.url}/swarm")
        await page.until("document.querySelector('.health')")
        assert await page.js("document.querySelector('.health').textContent") == "broken"
        assert "nobody holds blocks 10:30" in await page.js("document.querySelector('.words').textContent")
        assert await page.js("document.querySelectorAll('.map .c0').length") == 20
        assert door.server.peer_id[-8:] in await page.js("document.querySelector('td.peer').textContent")
        assert "gave 0 block-tokens" in await page.js("document.querySelector('.contribution .words').textContent")


async def test_the_swarm_page_shows_routes_round_trips_and_plots(
    open_door: OpenDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petals.gateway.history.PERIOD_S", 0.05)
    async with open_door() as door, visiting(door.url, tmp_path) as page, trio.open_nursery() as nursery:

        async def ask() -> None:
            while True:  # there is always an answer under way
                body = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 1500}
                await door.post("/v1/chat/completions", {"model": NAME, **body})

        nursery.start_soon(ask)
        await page.go(f"{door.url}/swarm")
        hop = f"0:30 …{door.server.peer_id[-8:]}"
        await page.until(f"document.querySelector('.sessions .hop')?.textContent.startsWith({json.dumps(hop)})")
        await page.until("document.querySelector('td.rtt')?.textContent.endsWith('s')")
        await page.until("document.querySelectorAll('.plot .curve').length === 3")
        label = "document.querySelector('.plot svg').getAttribute('aria-label')"
        assert (await page.js(label)).startswith("Tokens generated per second: now ")
        await page.until("document.querySelector('.model tbody').textContent.includes('direct')")
        await page.look(width=390, height=844)
        assert await page.js("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling on a phone"
        nursery.cancel_scope.cancel()


MARKDOWN = r"""***both*** and __strong__, 2 * 3 * 4, snake_case_name, \*not em\*, \(x^2\)
[paren](https://example.org/a_(b)) and https://example.org/c.

- [ ] open
- [x] done

| left | right |
|:--|--:|
| a \| b | 1 | surplus |
| short |
"""


async def test_markdown_as_models_write_it(open_door: OpenDoor, tmp_path: Path) -> None:
    async with open_door() as door, visiting(door.url, tmp_path) as page:
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": MARKDOWN}]
        await keep(page, {"id": "a", "title": "x", "touched": 1, "messages": messages})
        await page.go(door.url)
        await page.until(f"{ANSWER}?.textContent.includes('surplus') === false")
        assert await page.js(f"{ANSWER}.querySelector('strong em').textContent") == "both"
        assert await page.js(f"{ANSWER}.querySelectorAll('strong')[1].textContent") == "strong"
        text = await page.js(f"{ANSWER}.textContent")
        assert "2 * 3 * 4, snake_case_name, *not em*, \\(x^2\\)" in text
        links = await page.js(f"[...{ANSWER}.querySelectorAll('a')].map(e => e.href)")
        assert links == ["https://example.org/a_(b)", "https://example.org/c"]
        assert await page.js(f"[...{ANSWER}.querySelectorAll('li')].map(e => e.textContent)") == ["☐ open", "☑ done"]
        rows = await page.js(f"[...{ANSWER}.querySelectorAll('tr')].map(r => [...r.cells].map(c => c.textContent))")
        assert rows == [["left", "right"], ["a | b", "1"], ["short", ""]]
        assert await page.js(f"getComputedStyle({ANSWER}.querySelector('td:last-child')).textAlign") == "right"
        for width in (1280, 390):
            await page.look(width=width)
            assert await page.js("document.documentElement.scrollWidth <= innerWidth")


async def keep(page: Page, *chats: dict[str, Any]) -> None:
    """Chats that this browser has had before."""
    told = json.dumps({"now": chats[0]["id"], "chats": chats})
    await page.js(f"localStorage.setItem('petals.chats', {json.dumps(told)})")


async def test_the_keyboard_is_enough_and_never_lost(open_door: OpenDoor, tmp_path: Path) -> None:
    async with open_door() as door, visiting(door.url, tmp_path) as page:
        await settle(page, max_tokens="400")
        await page.go(door.url)
        await page.until("document.querySelector('#model').value")
        rows = "document.querySelector('#prompt').rows"
        await page.type("Tell me")
        await page.press("Enter", shift=True)
        await page.type("a long story.")
        await page.until(f"{rows} === 2")
        await page.press("Tab")
        assert await page.js("document.activeElement.id") == "send"
        await page.press("Enter")
        await page.until(f"{ANSWER} && {ANSWER}.textContent.length > 10")
        assert await page.js("document.activeElement.id") == "stop", "where the finger is, it still stops"
        assert await page.js(rows) == 1, "the field is as small as before"
        assert await page.js("getComputedStyle(document.querySelector('.writing .acts')).visibility") == "hidden"
        await page.press("Escape")
        await page.until(IDLE)
        assert await page.js("document.activeElement.id") == "prompt"
        kept = await page.js("JSON.parse(localStorage['petals.chats']).chats[0].messages[0].content")
        assert kept == "Tell me\na long story."
        await page.js("document.querySelector('.user .acts button').click()")
        assert await page.js("document.activeElement.tagName") == "TEXTAREA"
        await page.press("Escape")
        assert await page.js("document.activeElement.id") == "prompt"
        for _ in range(12):  # all round, and each stop can be seen
            await page.press("Tab")
            outline = "(e => e === document.body || e.id === 'prompt' || getComputedStyle(e).outlineStyle === 'solid')"
            assert await page.js(f"{outline}(document.activeElement)")


async def test_what_goes_wrong_says_what_to_do(open_door: OpenDoor, tmp_path: Path) -> None:
    key = create_key(tmp_path / "keys.txt")
    async with open_door(range(10), api_keys=tmp_path / "keys.txt") as door, open_page(tmp_path / "profile") as page:
        await page.look()
        await page.go(door.url)
        await page.until("document.querySelector('#trouble').textContent.startsWith('This peer wants an API key.')")
        await page.click("#trouble button")
        assert await page.js("document.activeElement.id") == "key"
        await page.type(key)
        await page.press("Enter")
        await page.until("document.querySelector('#model').value")
        await page.until("document.querySelector('#trouble').textContent.startsWith('Now nobody holds blocks 10:30:')")
        await page.js("document.querySelector('#prompt').focus()")
        await page.type("Hello")
        await page.press("Enter")
        await page.until("document.querySelector('#messages .error')")
        assert "holds blocks 10:30" in await page.js("document.querySelector('#messages [role=alert]').textContent")
        acts = "[...document.querySelectorAll('.assistant .acts button')].map(e => e.textContent)"
        assert await page.js(acts) == ["Try again"]


async def test_the_swarm_page_stays_where_it_was_moved_to(open_door: OpenDoor, tmp_path: Path) -> None:
    async with open_door() as door, visiting(door.url, tmp_path) as page:
        await page.look(width=390, height=844)
        await page.go(f"{door.url}/swarm")
        await page.until("document.querySelector('.table')")
        await page.js("window.old = document.querySelector('.table'); old.scrollLeft = 60; old.focus()")
        await page.until("document.querySelector('.table') !== window.old")
        assert await page.js("document.querySelector('.table').scrollLeft") == 60
        assert await page.js("document.activeElement === document.querySelector('.table')")
        assert await page.js("document.querySelectorAll('h1').length") == 1
        assert await page.js("document.documentElement.scrollWidth <= innerWidth")
