"""The door itself: which path leads where. An ASGI application over one peer."""

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

from petals.gateway.asgi import ALLOWANCE, ClientGone, Doorkeeper, read_json
from petals.gateway.config import HttpConfig
from petals.gateway.errors import ApiError, as_api_error
from petals.gateway.generations import Answerer, Offered
from petals.gateway.history import History, Reading
from petals.gateway.keys import Limits
from petals.gateway.limits import Allowance
from petals.gateway.metrics import CONTENT_TYPE, Meter
from petals.gateway.pages import load_pages
from petals.gateway.request_parser import Wanted, check_model, read_chat, read_completion, unknown_model
from petals.gateway.responses import route_of
from petals.gateway.swarm import describe
from petals.peer.node import Peer
from petals.protocols.errors import SwarmError

NO_STORE = {"cache-control": "no-store"}
CLIENT_GONE = 499
"""For the record only: nobody reads it."""

Respond = Callable[..., Awaitable[None]]


class Gateway:
    """One peer's models over HTTP; holds no state of its own beyond counters."""

    def __init__(
        self, peer: Peer, config: HttpConfig, models: dict[str, Offered], keys: Mapping[str, Limits] | None
    ) -> None:
        """
        Args:
            keys: what each may ask, by hash; None: nobody needs one.
        """
        self._peer = peer
        self._config = config
        self._models = models
        self._keys = keys
        self._meter = Meter()
        self._answerer = Answerer(peer, self._meter, config.max_answers)
        self._opened = int(time.time())
        self.history = History(self._read)
        """Needs its `run` running."""

    def app(self) -> Starlette:
        """The ASGI application."""
        keys = None
        if self._keys is not None:
            keys = {each: Allowance(limits, time.monotonic) for each, limits in self._keys.items()}
        routes = [
            Route("/v1/models", self._counted(self._list_models)),
            Route("/v1/models/{name:path}", self._counted(self._show_model)),
            Route("/v1/chat/completions", self._counted(self._chat), methods=["POST"]),
            Route("/v1/completions", self._counted(self._complete), methods=["POST"]),
            Route("/api/swarm", self._counted(self._swarm)),
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
                ),
            )
        handlers: Any = {HTTPException: _no_such_path, Exception: _failed, ApiError: _api_error, ClientGone: _gone}
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)

    async def _chat(self, request: Request) -> Respond:
        body = await read_json(request, self._config)
        return await self._answer(request, read_chat(body, default_new_tokens=self._config.default_new_tokens))

    async def _complete(self, request: Request) -> Respond:
        return await self._answer(request, read_completion(await read_json(request, self._config)))

    async def _answer(self, request: Request, wanted: Wanted) -> Respond:
        check_model(wanted, list(self._models))
        model = self._models[wanted.model]
        allowance = request.scope.get(ALLOWANCE)
        if wanted.stream:
            return self._answerer.streamed(wanted, model, allowance)
        return JSONResponse(await self._answerer.whole(wanted, model, allowance, request.receive), headers=NO_STORE)

    async def _list_models(self, request: Request) -> Response:
        listed = [self._describe(model) for model in self._models.values()]
        return JSONResponse({"object": "list", "data": listed}, headers=NO_STORE)

    async def _show_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._models:
            raise unknown_model(name, list(self._models))
        return JSONResponse(self._describe(self._models[name]), headers=NO_STORE)

    def _describe(self, model: Offered) -> dict[str, object]:
        return {"id": model.name, "object": "model", "created": self._opened, "owned_by": "petals"}

    async def _swarm(self, request: Request) -> Response:
        described = []
        for model in self._models.values():
            client = await self._peer.client(model.argument)
            told = describe(client.watcher.view, client.checkpoint.num_blocks, self._peer.host.link)
            sessions = [route_of(stream) for name, stream in self._answerer.running if name == model.name]
            described.append(told | {"model": model.name, "sessions": sessions})
        whole = {
            "peer_id": self._peer.peer_id,
            "models": described,
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
            self._answerer.active,
            server.inbound.sessions if server is not None else 0,
        )

    async def _metrics(self, request: Request) -> Response:
        text = self._meter.text(self._peer, self._answerer.active)
        return PlainTextResponse(text, headers={"content-type": CONTENT_TYPE, **NO_STORE})

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "peer_id": self._peer.peer_id}, headers=NO_STORE)

    def _counted(self, handler: Callable[[Request], Awaitable[Respond]]) -> Callable[[Request], Awaitable[Respond]]:
        """`handler`, with every request counted by its route and status once it has ended."""

        async def counted(request: Request) -> Respond:
            path = request.scope["path"] if "name" not in request.path_params else "/v1/models/NAME"
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
                self._meter.answered(path, 200)

            return responding

        return counted


async def open_models(peer: Peer, config: HttpConfig) -> dict[str, Offered]:
    """The peer's own model and the others it shall offer, by the names that clients use.

    Raises:
        ModelError: one of them can not be opened.
    """
    models = {}
    for argument in (None, *config.models):
        client = await peer.client(argument)
        models[client.model.name] = Offered(client.model.name, argument, client.model.digest)
    return models


async def _api_error(request: Request, error: Exception) -> Response:
    known = as_api_error(error)
    return JSONResponse(known.body(), known.status, known.headers() | NO_STORE)


async def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    shown = request.scope["path"].encode(errors="replace").decode()[:200]
    hint = ""
    if shown.startswith("/v1"):
        hint = "; this peer answers /v1/models, /v1/chat/completions and /v1/completions"
    elif shown.endswith(("/models", "/completions")):
        hint = "; the base URL of OpenAI's API here ends in /v1"
    words = {404: f"there is nothing at {shown}{hint}", 405: f"{shown} does not take {request.method}"}
    code = "method_not_supported" if error.status_code == 405 else "unknown_url"
    known = ApiError(error.status_code, words.get(error.status_code, error.detail), code=code)
    return JSONResponse(known.body(), known.status, {**(error.headers or {}), **NO_STORE})


async def _failed(request: Request, error: Exception) -> Response:
    """A bug of ours; the server logs it when Starlette raises it again."""
    known = ApiError(500, "the peer made a mistake; its log says more", code="internal_error")
    return JSONResponse(known.body(), known.status)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)
