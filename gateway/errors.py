"""What goes wrong, in OpenAI's shape: a status, and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import math
from typing import Any

from petals.models.errors import ModelError
from petals.peer.client.generation.prompts import PromptTooLong
from petals.protocols.errors import MissingBlocks, NeverFits, PeerBusy, SwarmError, UserError

log = logging.getLogger(__name__)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
RETRY_AFTER_S = 5.0
"""When to ask again what the swarm can not do now, if it did not say."""


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        param: the field that is wrong.
        code: for programs; the message is for people.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {"retry-after": str(math.ceil(self.retry_after_s))} if self.retry_after_s is not None else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
OLLAMA = ("/api/chat", "/api/generate", "/api/tags", "/api/show", "/api/ps", "/api/version", "/api/embed")


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    """An error as clients of this path read it: OpenAI's, Anthropic's or Ollama's."""
    if path.startswith("/v1/messages"):
        kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": str(error)}}
    if path.startswith(OLLAMA):
        return {"error": str(error)}
    return error.body()


def as_api_error(error: Exception) -> ApiError:
    """What the peer raised, as an answer. What nobody expected is logged, and not told to strangers."""
    message = " ".join(str(error).split())
    match error:
        case ApiError():
            return error
        case PromptTooLong() | NeverFits():
            return ApiError(400, message, code="context_length_exceeded")
        case UserError():
            return ApiError(400, message)
        case MissingBlocks():
            return ApiError(503, message, code="missing_blocks", retry_after_s=RETRY_AFTER_S)
        case PeerBusy():
            return ApiError(503, message, code="swarm_busy", retry_after_s=error.retry_after_s or RETRY_AFTER_S)
        case SwarmError():
            return ApiError(503, message, code="swarm_error", retry_after_s=RETRY_AFTER_S)
        case ModelError():
            return ApiError(500, message, code="model_error")
        case _:
            log.error("an answer failed", exc_info=error)
            return ApiError(500, "the peer made a mistake; its log says more", code="internal_error")
