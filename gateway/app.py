"""The gateway itself: which path leads where. An ASGI application over one peer."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from petals.gateway.anthropic_messages import anthropic_routes
from petals.gateway.asgi import ClientGone, Doorkeeper
from petals.gateway.chat_requests import read_chat
from petals.gateway.config import HttpConfig
from petals.gateway.desk import NO_STORE, Desk, Handler, Respond
from petals.gateway.errors import ApiError, as_api_error, error_body
from petals.gateway.generations import Answerer, Offered
from petals.gateway.history import History, Reading
from petals.gateway.keys import Limits
from petals.gateway.limits import Allowance
from petals.gateway.metrics import CONTENT_TYPE, Meter
from petals.gateway.offers import Offers
from petals.gateway.ollama import ollama_routes
from petals.gateway.openai_responses import responses_routes
from petals.gateway.pages import load_pages
from petals.gateway.request_parser import read_completion
from petals.gateway.responses import ChatWriter, TextWriter
from petals.gateway.swarm import describe
from petals.gateway.vectors import vector_routes
from petals.gateway.waiting import WaitingLine
from petals.gateway.writing import route_of
from petals.peer.node import Peer
from petals.protocols.errors import SwarmError

CLIENT_GONE = 499
"""For the record only: nobody reads it."""


class Gateway:
    """One peer's models over HTTP; holds no state of its own beyond counters and who waits."""

    def __init__(
        self, peer: Peer, config: HttpConfig, models: dict[str, Offered], keys: Mapping[str, Limits] | None
    ) -> None:
        """
        Args:
            keys: what each may ask, by hash; None: nobody needs one.
        """
        self._peer = peer
        self._config = config
        self._keys = keys
        self._meter = Meter()
        self._line = WaitingLine(config.max_answers, config.max_waiting, config.wait_s)
        self._line.on_wait = self._meter.waited
        self._answerer = Answerer(peer, self._meter, self._line)
        self._offers = Offers(peer, models)
        self._desk = Desk(config, self._offers, self._answerer)
        self.history = History(self._read)
        """Needs its `run` running."""

    def app(self) -> Starlette:
        """The ASGI application."""
        keys = None
        if self._keys is not None:
            keys = {each: Allowance(limits, time.monotonic) for each, limits in self._keys.items()}
        counted: dict[str, tuple[str, Handler]] = {
            "/v1/models": ("GET", self._list_models),
            "/v1/models/{name:path}": ("GET", self._show_model),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/completions": ("POST", self._complete),
            "/api/swarm": ("GET", self._swarm),
            "/ready": ("GET", self._ready),
            **responses_routes(self._desk),
            **anthropic_routes(self._desk, self._peer),
            **ollama_routes(self._desk, self._peer),
            **vector_routes(self._desk, self._peer),
        }
        routes = [
            *(Route(path, self._counted(path, handler), methods=[m]) for path, (m, handler) in counted.items()),
            Route("/metrics", self._metrics),
            Route("/health", self._health),
            *(Route(path, page.answer) for path, page in load_pages().items()),
        ]
        middleware = [Middleware(Doorkeeper, config=self._config, keys=keys)]
        if self._config.cors:
            middleware.insert(
                0,
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(self._config.cors),
                    allow_methods=["GET", "POST"],
                    allow_headers=["*"],
                    expose_headers=["x-request-id"],
                ),
            )
        handlers: Any = {HTTPException: _no_such_path, Exception: _failed, ApiError: _api_error, ClientGone: _gone}
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)

    async def _chat(self, request: Request) -> Respond:
        wanted = read_chat(await self._desk.read(request), default_new_tokens=self._config.default_new_tokens)
        return await self._desk.answer(request, wanted, ChatWriter)

    async def _complete(self, request: Request) -> Respond:
        return await self._desk.answer(request, read_completion(await self._desk.read(request)), TextWriter)

    async def _list_models(self, request: Request) -> Response:
        listed = [await self._offers.describe(model) for model in await self._offers.all()]
        return JSONResponse({"object": "list", "data": listed}, headers=NO_STORE)

    async def _show_model(self, request: Request) -> Response:
        model = await self._offers.find(request.path_params["name"])
        return JSONResponse(await self._offers.describe(model), headers=NO_STORE)

    async def _swarm(self, request: Request) -> Response:
        described = []
        for model in self._offers.models.values():
            client = await self._peer.client(model.argument)
            told = describe(client.watcher.view, client.checkpoint.num_blocks, self._peer.host.link)
            running = self._answerer.running
            sessions = [route_of(stream) for name, stream in running if name.startswith(model.name)]
            described.append(told | {"model": model.name, "sessions": sessions})
        whole = {
            "peer_id": self._peer.peer_id,
            "models": described,
            "answers": {
                "running": self._line.running,
                "waiting": self._line.waiting,
                "at_once": self._config.max_answers,
            },
            "history": self.history.as_json(),
            "contribution": self._peer.ledger.describe(),
            "warnings": self._peer.warnings(),
        }
        return JSONResponse(whole, headers=NO_STORE)

    def _read(self) -> Reading:
        running = [stream for _, stream in self._answerer.running]
        server = self._peer.server
        return Reading(
            self._meter.prompt_tokens + sum(len(stream.prompt_ids) for stream in running),
            self._meter.generated_tokens + sum(len(stream.token_ids) for stream in running),
            self._line.running,
            server.inbound.sessions if server is not None else 0,
        )

    async def _metrics(self, request: Request) -> Response:
        text = self._meter.text(self._peer, self._line)
        return PlainTextResponse(text, headers={"content-type": CONTENT_TYPE, **NO_STORE})

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "peer_id": self._peer.peer_id}, headers=NO_STORE)

    async def _ready(self, request: Request) -> Response:
        """200 where every block of every model is held by somebody; 503 names what is missing."""
        missing = {}
        for model in self._offers.models.values():
            client = await self._peer.client(model.argument)
            held = {block for offer in client.watcher.view.offers for block in offer.record.blocks}
            if lacking := sorted(set(range(client.checkpoint.num_blocks)) - held):
                missing[model.name] = lacking
        status = {"status": "missing blocks" if missing else "ready", "missing_blocks": missing}
        return JSONResponse(status, 503 if missing else 200, headers=NO_STORE)

    def _counted(self, path: str, handler: Handler) -> Callable[[Request], Awaitable[Respond]]:
        """`handler`, with every request counted by its route and status once it has ended."""
        path = path.replace("{name:path}", "NAME")

        async def counted(request: Request) -> Respond:
            try:
                respond = await handler(request)
            except ClientGone:
                self._meter.answered(path, CLIENT_GONE)
                raise
            except (ApiError, SwarmError) as error:
                self._meter.answered(path, as_api_error(error).status)
                raise

            async def responding(*door: Any) -> None:
                try:
                    await respond(*door)
                except ApiError as error:
                    self._meter.answered(path, error.status)
                    raise
                self._meter.answered(path, getattr(respond, "status_code", 200))

            return responding

        return counted


async def _api_error(request: Request, error: Exception) -> Response:
    known = as_api_error(error)
    return JSONResponse(error_body(request.scope["path"], known), known.status, known.headers() | NO_STORE)


async def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    shown = request.scope["path"].encode(errors="replace").decode()[:200]
    hint = ""
    if shown.startswith("/v1"):
        hint = "; this peer answers /v1/models, /v1/chat/completions, /v1/completions and others (docs/gateway.md)"
    elif shown.endswith(("/models", "/completions", "/embeddings", "/responses")):
        hint = "; the base URL of OpenAI's API here ends in /v1"
    words = {404: f"there is nothing at {shown}{hint}", 405: f"{shown} does not take {request.method}"}
    code = "method_not_supported" if error.status_code == 405 else "unknown_url"
    known = ApiError(error.status_code, words.get(error.status_code, error.detail), code=code)
    return JSONResponse(error_body(shown, known), known.status, {**(error.headers or {}), **NO_STORE})


async def _failed(request: Request, error: Exception) -> Response:
    """A bug of ours; the server logs it when Starlette raises it again."""
    known = ApiError(500, "internal error; see the peer's log", code="internal_error")
    return JSONResponse(error_body(request.scope["path"], known), known.status)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)
