"""`petals status --url`: what a running peer's own door tells, in a terminal; and what other doors answer."""

from __future__ import annotations

import http.server
import json
import os
import pty
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from petals.cli.status.client import ask_swarm, read_address
from petals.gateway.config import HttpConfig
from petals.gateway.keys import create_key
from petals.gateway.server import open_gateway
from petals.protocols.errors import UserError
from tests.cli.test_commands import ENVIRONMENT, PETALS, ROOT, run
from tests.gateway.conftest import NAME, OpenDoor
from tests.models.tiny import CASES, save_tiny
from tests.swarm.conftest import Swarm


async def status(*words: str) -> subprocess.CompletedProcess[str]:
    """The command, beside the door that answers it in this process."""
    return await trio.to_thread.run_sync(partial(run, "status", *words))


async def test_routes_and_throughput_are_shown(open_door: OpenDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petals.gateway.history.PERIOD_S", 0.05)
    async with open_door() as door, trio.open_nursery() as nursery:

        async def ask() -> None:
            while True:  # there is always an answer under way
                body = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 1500}
                await door.post("/v1/chat/completions", {"model": NAME, **body})

        nursery.start_soon(ask)
        hop = f"0:30 via …{door.server.peer_id[-6:]} ("
        with trio.fail_after(60):
            while True:
                seen = await status("--url", f"{door.url}/swarm")  # the page's address will do
                assert seen.returncode == 0, seen.stderr
                if hop in seen.stdout and "tokens generated per second: now" in seen.stdout:
                    break
        told = json.loads((await status("--url", door.url, "--json")).stdout)
        nursery.cancel_scope.cancel()
    assert f"{NAME}: degraded, there is only one copy of all blocks" in seen.stdout
    assert "routes now (1):" in seen.stdout
    assert "█" in seen.stdout
    assert "\x1b" not in seen.stdout, "light where nobody looks"
    (model,) = told["models"]
    assert model["peers"][0]["peer_id"] == door.server.peer_id
    assert told["history"]["samples"]
    assert "sessions" in model


async def test_watching_goes_on_when_the_peer_comes_back(make_swarm: Callable[..., Swarm]) -> None:
    """In a terminal of its own; the peer's door is shut and opened again."""
    swarm = make_swarm()
    server = await swarm.add(range(30))
    main, other = pty.openpty()
    async with open_gateway(server, HttpConfig(bind="127.0.0.1:0")) as url:
        command = [*PETALS, "status", "--url", url, "--watch", "--interval", "0.1"]
        environment = ENVIRONMENT | {"TERM": "xterm"}
        process = await trio.lowlevel.open_process(
            command, cwd=ROOT, env=environment, stdin=other, stdout=other, stderr=other
        )
        os.close(other)
        shown = partial(trio.to_thread.run_sync, _read_until, main)
        await shown(f"as peer …{server.peer_id[-6:]} sees it")
    await shown("nobody listens at")
    async with open_gateway(server, HttpConfig(bind=url.removeprefix("http://"))):
        await shown(f"as peer …{server.peer_id[-6:]} sees it")
        process.send_signal(signal.SIGINT)
        with trio.fail_after(30):
            assert await process.wait() == 0
    os.close(main)


def _read_until(terminal: int, words: str) -> None:
    """The test's own deadline is the bound."""
    seen = ""
    while words not in seen:
        seen += os.read(terminal, 4096).decode(errors="replace")


async def test_a_door_with_keys_says_so(open_door: OpenDoor, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    key = create_key(keys)
    (tmp_path / "key").write_text(f"{key}\n")
    async with open_door(range(2), api_keys=keys) as door:
        for words, complaint in (
            ((), "wants an API key: give --api_key KEY"),
            (("--api_key", "petals-guess"), "does not know that API key"),
            (("--api_key", "schlüssel"), "that API key can not be one"),
        ):
            refused = await status("--url", door.url, *words)
            assert refused.returncode == 2
            assert refused.stderr.count("\n") == 1 + len(words) // 2, "a key among the arguments is warned of, too"
            assert complaint in refused.stderr
        assert (await status("--url", door.url, "--api_key", f"@{tmp_path / 'key'}")).returncode == 0


async def test_a_door_that_answers_to_localhost_only_says_so(open_door: OpenDoor) -> None:
    async with open_door(range(2)) as door:
        with pytest.raises(UserError, match="refused: this peer answers to localhost only"):
            await ask_swarm(read_address(door.url.replace("127.0.0.1", "127.1")))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/swarm", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://example.org/petals/", "https://example.org:443/petals"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("localhost", "http://localhost:80"),
    ],
)
def test_addresses_are_read_as_people_write_them(url: str, said: str) -> None:
    assert str(read_address(url)) == said


@pytest.mark.parametrize(
    "url", ["", "/ip4/127.0.0.1/tcp/1", "ftp://x", "http://", "x:99999", "http://a b/", "http://[::1", "http://a\r\nb"]
)
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(UserError, match="no URL of a peer"):
        read_address(url)


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """Somebody else's web server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("code", "body", "complaint"),
    [
        (200, b"<html>", "is no Petals peer"),
        (200, b'{"models": {}}', "is no Petals peer"),
        (404, b'{"error": {"message": "no such page"}}', "is no Petals peer"),
        (302, b"", r"is no Petals peer \(it answered 302\)"),
        (500, b'{"error": {"message": "made a \\u001b mistake"}}', "refused: made a  mistake"),
    ],
)
async def test_others_are_told_from_peers(code: int, body: bytes, complaint: str) -> None:
    with answering(code, body) as url, pytest.raises(UserError, match=complaint):
        await ask_swarm(read_address(url))


def test_an_answer_of_another_shape_is_one_line() -> None:
    with answering(200, b'{"peer_id": "p", "models": [{"model": "m", "health": 5}]}') as url:
        seen = run("status", "--url", url)
        assert seen.returncode == 2
        assert "is not one of this version of Petals" in seen.stderr
        assert seen.stderr.count("\n") == 1
        assert run("status", "--url", url, "--json").returncode == 0


async def test_who_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent, socket.socket() as closed:
        for each in (silent, closed):
            each.bind(("127.0.0.1", 0))
        silent.listen()
        port = closed.getsockname()[1]
        with pytest.raises(UserError, match=f"nobody listens at http://127.0.0.1:{port}: start the peer with --http"):
            await ask_swarm(read_address(f"127.0.0.1:{port}"))
        monkeypatch.setattr("petals.cli.status.client.ANSWER_S", 0.05)
        with pytest.raises(UserError, match="within 0 s"):
            await ask_swarm(read_address(f"127.0.0.1:{silent.getsockname()[1]}"))


async def test_a_port_of_the_swarm_is_no_door(make_swarm: Callable[..., Swarm], tiny_model: str) -> None:
    peer = await make_swarm(tiny_model).add(range(4))
    port = peer.addrs[0].split("/")[4]
    with pytest.raises(UserError, match="does not speak HTTP"):
        await ask_swarm(read_address(f"127.0.0.1:{port}"))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tiny-asking")
    save_tiny(next(case for case in CASES if case.id == "llama"), directory)
    return str(directory)
