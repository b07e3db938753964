"""Between the handlers and the ASGI server: bounded bodies, hang-ups, answers in pieces, and who may come in."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from ipaddress import ip_address
from typing import TypeVar
from urllib.parse import urlsplit

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from petals.gateway.config import HttpConfig
from petals.gateway.errors import ApiError, error_body
from petals.gateway.fields import parse_json
from petals.gateway.keys import hash_key, hash_of
from petals.gateway.limits import Allowance

T = TypeVar("T")

DRAIN_S = 1.0
"""For a body that is not looked at."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
GUARDED = ("/v1/", "/api/", "/metrics", "/tokenize", "/detokenize")
"""What needs a key, where there are keys. The pages themselves hold no secret."""
COUNTED = ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings")
"""What a key's limit on requests is about, beside /v1/."""
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


class ByteStream:
    """An answer in pieces. It begins with the first of them: what goes wrong before can still be a status."""

    def __init__(self, send: Send, content_type: str) -> None:
        self._send = send
        self._content_type = content_type
        self._one_at_a_time = trio.Lock()
        self.started = False

    async def send(self, parts: Iterable[bytes]) -> None:
        """These at once; what several tasks send does not mix."""
        body = b"".join(parts)
        if not body:
            return
        async with self._one_at_a_time:
            if not self.started:
                self.started = True
                headers = [
                    (b"content-type", self._content_type.encode()),
                    (b"cache-control", b"no-store"),
                    (b"x-accel-buffering", b"no"),
                ]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain(receive: Receive) -> None:
    """Read a body that is of no use, for a moment: hypercorn 0.18 may close the connection while an answer is being
    sent to a request whose body is still arriving (symptom: no answer, BusyResourceError in the log)."""
    with trio.move_on_after(DRAIN_S):
        while (await receive()).get("more_body", False):
            pass


class Doorkeeper:
    """Middleware: refuses who may not come in, and adds the headers that every answer has.

    A page of a stranger can make a visitor's browser talk to a port of the visitor's own machine, under a name that
    the stranger points there. So, as long as no key is asked for, only names that no stranger can point somewhere are
    answered: localhost, addresses, this machine's own name, and those of `HttpConfig.hosts`.
    """

    def __init__(self, app: ASGIApp, config: HttpConfig, keys: Mapping[str, Allowance] | None) -> None:
        """
        Args:
            keys: by hash; None: nobody needs one.
        """
        self._app = app
        self._keys = keys
        self._names: frozenset[str] | None = None
        self._loopback = config.is_loopback
        if keys is None and "*" not in config.hosts:
            origins = {urlsplit(origin).hostname or "" for origin in config.cors}
            own = set() if config.is_loopback else {socket.gethostname().lower()}
            self._names = LOOPBACK_NAMES | origins | own | {each.lower() for each in config.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = {name: value.decode("latin-1") for name, value in scope["headers"]}
        request_id = told.get(b"x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        smuggled = b"content-length" in told and b"transfer-encoding" in told

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), *HEADERS, (b"x-request-id", request_id.encode())]
                if smuggled:
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        error = self._refusal(scope, told)
        if smuggled:  # two servers behind each other may disagree on where such a request ends
            error = ApiError(400, "content-length and transfer-encoding do not go together")
            await _drain(receive)
        if error is not None:
            body = error_body(scope["path"], error)
            response = JSONResponse(body, error.status, error.headers())
            await response(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope, told: Mapping[bytes, str]) -> ApiError | None:
        if self._names is not None and not self._is_known(_without_port(told.get(b"host", ""))):
            return ApiError(403, "this peer answers to localhost only; --api_keys opens it to other names")
        path = scope["path"]
        if self._keys is not None and path.startswith(GUARDED):
            key = hash_of(told.get(b"authorization", "")) or ""
            if not key and b"x-api-key" in told:  # as Anthropic's clients send it
                key = hash_key(told[b"x-api-key"].strip())
            if not key and b"authorization" not in told:
                return ApiError(401, "this peer wants an API key: Authorization: Bearer KEY", code="missing_api_key")
            allowance = self._keys.get(key)
            if allowance is None:
                return ApiError(401, "this peer does not know that API key", code="invalid_api_key")
            scope[ALLOWANCE] = allowance
            if path.startswith("/v1/") or path in COUNTED:
                try:
                    allowance.take_request()
                except ApiError as error:
                    return error
        return None

    def _is_known(self, name: str) -> bool:
        assert self._names is not None
        if name in self._names:
            return True
        return not self._loopback and _is_address(name)


_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _is_address(name: str) -> bool:
    try:
        ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
