"""Between the handlers and the ASGI server: bounded bodies, hang-ups, server-sent events, and who may come in."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from petals.gateway.config import HttpConfig
from petals.gateway.errors import ApiError
from petals.gateway.fields import parse_json
from petals.gateway.keys import hash_of
from petals.gateway.limits import Allowance

T = TypeVar("T")

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
GUARDED = ("/v1/", "/api/", "/metrics")
"""What needs a key, where there are keys. The pages themselves hold no secret."""
ALLOWANCE = "petals.allowance"
"""Where a request's scope has what its key may still ask; absent where no keys are needed."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def read_json(request: Request, config: HttpConfig) -> object:
    """The body of a request.

    Raises:
        ApiError: it is too long, too slow, not JSON, or does not say that it is. ClientGone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also keeps forms of foreign pages out, which browsers send without asking us first
        raise ApiError(400, "send JSON, with the header content-type: application/json")
    too_long = ApiError(413, f"a request may have {config.max_body_bytes} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > config.max_body_bytes:
        raise too_long
    body = bytearray()
    with trio.move_on_after(config.body_s) as scope:
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > config.max_body_bytes:
                raise too_long
            more = message.get("more_body", False)
    if scope.cancelled_caught:
        raise ApiError(408, f"the body did not come within {config.body_s:g} s")
    return parse_json(bytes(body))


async def unless_gone(receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
    """What `work` returns or raises; it is cancelled as soon as the client hangs up.

    Raises:
        ClientGone: that happened.
    """
    results: list[T] = []
    failures: list[Exception] = []

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            results.append(await work())
        except Exception as error:  # kept, not handled: raised below, outside of the nursery's group
            failures.append(error)
        nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]
    if not results:
        raise ClientGone
    return results[0]


class EventStream:
    """Server-sent events. The answer begins with the first of them: what goes wrong before can still be a status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._one_at_a_time = trio.Lock()
        self.started = False

    async def emit(self, data: dict[str, Any] | str) -> None:
        """One event; events of several tasks do not mix."""
        text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
        async with self._one_at_a_time:
            if not self.started:
                self.started = True
                headers = [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-store"),
                    (b"x-accel-buffering", b"no"),
                ]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            body = f"data: {text}\n\n".encode()
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


class Doorkeeper:
    """Middleware: refuses who may not come in, and adds the headers that every answer has.

    A page of a stranger can make a visitor's browser talk to a port of the visitor's own machine, under a name that
    the stranger points there. So, as long as no key is asked for, a loopback door answers to loopback names only.
    """

    def __init__(self, app: ASGIApp, config: HttpConfig, keys: Mapping[str, Allowance] | None) -> None:
        """
        Args:
            keys: by hash; None: nobody needs one.
        """
        self._app = app
        self._keys = keys
        self._names: frozenset[str] | None = None
        if config.is_loopback and keys is None:
            self._names = LOOPBACK_NAMES | {urlsplit(origin).hostname or "" for origin in config.cors}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        error = self._refusal(scope)
        if error is not None:
            response = JSONResponse(error.body(), error.status, error.headers())
            await response(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        told = {name: value.decode("latin-1") for name, value in headers}
        if self._names is not None and _without_port(told.get(b"host", "")) not in self._names:
            return ApiError(403, "this peer answers to localhost only; --api_keys opens it to other names")
        if self._keys is not None and scope["path"].startswith(GUARDED):
            if b"authorization" not in told:
                return ApiError(401, "this peer wants an API key: Authorization: Bearer KEY", code="missing_api_key")
            allowance = self._keys.get(hash_of(told[b"authorization"]) or "")
            if allowance is None:
                return ApiError(401, "this peer does not know that API key", code="invalid_api_key")
            scope[ALLOWANCE] = allowance
            if scope["path"].startswith("/v1/"):
                try:
                    allowance.take_request()
                except ApiError as error:
                    return error
        return None


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()
