"""A door over peers in this process: real HTTP on loopback, port 0."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
import trio

from petals.gateway.config import HttpConfig
from petals.gateway.server import open_gateway
from petals.peer.node import Peer
from tests.swarm.conftest import Swarm, _one_thread, make_swarm, smollm

__all__ = ["_one_thread", "make_swarm", "smollm"]

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
COLOURS = [{"role": "user", "content": "Name three colours."}]


@dataclass
class Door:
    """An open gateway and its address."""

    url: str
    server: Peer
    asker: Peer
    model: str = NAME
    prompts: list[str] = field(default_factory=list)
    """What a scripted model was given (scripted.py)."""
    client: openai.OpenAI = field(init=False)

    def __post_init__(self) -> None:
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, timeout=60, headers=headers) as client:
            if isinstance(body, bytes):
                return await client.post(path, content=body, headers={"content-type": "application/json"})
            return await client.post(path, json=body)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            return await client.get(path, headers=headers)


OpenDoor = Callable[..., Any]


@pytest.fixture
def open_door(make_swarm: Callable[..., Swarm]) -> OpenDoor:
    @asynccontextmanager
    async def opened(blocks: range = range(30), **settings: Any) -> AsyncIterator[Door]:
        """A swarm of one server, and a door at a peer that holds nothing."""
        swarm = make_swarm()
        server = await swarm.add(blocks)
        asker = await swarm.add()
        async with open_gateway(asker, HttpConfig(**{"bind": "127.0.0.1:0", **settings})) as url:
            door = Door(url, server, asker)
            yield door
            await trio.to_thread.run_sync(door.client.close)

    return opened
