"""What every API of the gateway does with a request: read it, find its model, have it answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from petals.gateway.asgi import ALLOWANCE, read_json
from petals.gateway.config import HttpConfig
from petals.gateway.generations import Answerer, Asker, WriterMaker
from petals.gateway.limits import Allowance
from petals.gateway.offers import Offers
from petals.gateway.request_parser import Wanted

NO_STORE = {"cache-control": "no-store"}

Respond = Callable[..., Awaitable[None]]
"""An ASGI application that answers one request."""
Handler = Callable[[Request], Awaitable[Any]]


class Desk:
    """Shared by the APIs, which only translate."""

    def __init__(self, config: HttpConfig, offers: Offers, answerer: Answerer) -> None:
        self.config = config
        self.offers = offers
        self.answerer = answerer

    async def read(self, request: Request) -> object:
        """The request's body.

        Raises:
            ApiError: it is no JSON, too long or too slow.
        """
        return await read_json(request, self.config)

    async def answer(self, request: Request, wanted: Wanted, make: WriterMaker) -> Respond:
        """
        Raises:
            ApiError. ClientGone: nobody waits for it.
        """
        model = await self.offers.find(wanted.model)
        if wanted.stream:
            return self.answerer.streamed(wanted, model, make, asker_of(request))
        whole = await self.answerer.whole(wanted, model, make, asker_of(request), request.receive)
        return JSONResponse(whole, headers=NO_STORE)


def asker_of(request: Request) -> Asker:
    """Whose turn it uses up: its key's, or its connection's."""
    allowance: Allowance | None = request.scope.get(ALLOWANCE)
    client = request.scope.get("client")
    return Asker(allowance, tuple(client) if client else None, None if allowance is None else allowance.answers)
