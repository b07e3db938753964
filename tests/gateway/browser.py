"""A real Chromium without a window, driven over the DevTools protocol: a websocket and JSON, nothing to install."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import trio
from trio_websocket import WebSocketConnection, open_websocket_url

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
WAIT_S = 60.0


class Page:
    """One tab."""

    def __init__(self, socket: WebSocketConnection, session: str) -> None:
        self.complaints: list[str] = []
        """Uncaught errors, and what the content policy forbade."""
        self._socket = socket
        self._session = session
        self._loaded = trio.Event()
        self._calls = 0
        self._answers: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._calls += 1
        number = self._calls
        send, receive = trio.open_memory_channel[dict[str, Any]](1)
        self._answers[number] = send
        message = {"id": number, "sessionId": self._session, "method": method, "params": params}
        await self._socket.send_message(json.dumps(message))
        with trio.fail_after(WAIT_S + 10):
            answer = await receive.receive()
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]  # type: ignore[no-any-return]

    async def listen(self) -> None:
        while True:
            message = json.loads(await self._socket.get_message())
            if message.get("id") in self._answers:
                await self._answers.pop(message["id"]).send(message)
            elif message.get("method") == "Page.loadEventFired":
                self._loaded.set()
            elif message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(message["params"]["exceptionDetails"]["exception"].get("description", "?"))
            elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.complaints.append(message["params"]["entry"]["text"])

    async def js(self, expression: str) -> Any:
        """The value of an expression; promises are awaited."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until an expression is true."""
        waiting = f"""new Promise((done, fail) => {{
            const end = performance.now() + {WAIT_S * 1e3};
            const look = () => ({condition}) ? done(true) : performance.now() > end ? done(false) : setTimeout(look, 5);
            look();
        }})"""
        assert await self.js(waiting), f"never: {condition}\n{await self.js('document.body.innerText')}"

    async def go(self, url: str) -> None:
        self._loaded = trio.Event()
        await self.call("Page.navigate", url=url)
        with trio.fail_after(WAIT_S):
            await self._loaded.wait()

    async def type(self, text: str) -> None:
        """Into whatever has the focus."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, *, shift: bool = False) -> None:
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        event: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        if key == "Enter":
            event["text"] = "\r"
        await self.call("Input.dispatchKeyEvent", type="keyDown", **event)
        event.pop("text", None)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    async def click(self, selector: str) -> None:
        """As a mouse does: at the middle of what is there, whatever lies on top."""
        x, y = await self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'nearest'});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def look(self, *, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def shoot(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot", format="png")
        await trio.Path(path).write_bytes(base64.b64decode(shot["data"]))

    async def prepare(self) -> Self:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        return self


@asynccontextmanager
async def open_page(profile: Path) -> AsyncIterator[Page]:
    """A tab of a browser of its own, which is gone when the context is left."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    environment = {**os.environ, "HOME": str(profile)}
    process = await trio.lowlevel.open_process(command, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    try:
        with trio.fail_after(60):
            said = b""
            while b"DevTools listening on" not in said or not said.endswith(b"\n"):
                fresh = await process.stderr.receive_some(4096)
                assert fresh, said.decode()
                said += fresh
        url = said.decode().partition("DevTools listening on ")[2].split()[0]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_drain, process.stderr)
            async with open_websocket_url(url, max_message_size=64 << 20) as socket:
                page = Page(socket, await _attach(socket))
                nursery.start_soon(page.listen)
                try:
                    yield await page.prepare()
                finally:
                    nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stderr.aclose()


async def _attach(socket: WebSocketConnection) -> str:
    async def ask(number: int, method: str, **params: Any) -> dict[str, Any]:
        await socket.send_message(json.dumps({"id": number, "method": method, "params": params}))
        while (answer := json.loads(await socket.get_message())).get("id") != number:
            pass
        return answer["result"]  # type: ignore[no-any-return]

    target = (await ask(1, "Target.createTarget", url="about:blank"))["targetId"]
    return (await ask(2, "Target.attachToTarget", targetId=target, flatten=True))["sessionId"]  # type: ignore[no-any-return]


async def _drain(stream: trio.abc.ReceiveStream) -> None:
    async for _ in stream:
        pass
