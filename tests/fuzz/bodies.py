"""What an HTTP client can send: bodies of OpenAI's requests."""

from __future__ import annotations

import json
from contextlib import suppress

from petals.gateway.errors import ApiError
from petals.gateway.fields import parse_json
from petals.gateway.request_parser import Wanted, check_model, read_chat, read_completion


def _check(wanted: Wanted) -> None:
    assert 1 <= len(wanted.choices()) <= 16
    check_model(wanted, ["tiny"])


def chat(data: bytes) -> None:
    """POST /v1/chat/completions."""
    refused: list[ApiError] = []
    try:
        _check(read_chat(parse_json(data), default_new_tokens=64))
    except ApiError as error:
        refused.append(error)
    for each in refused:
        assert len(json.dumps(each.body()).encode()) < 4000
        assert each.status in (400, 404)


def completion(data: bytes) -> None:
    """POST /v1/completions."""
    with suppress(ApiError):
        _check(read_completion(parse_json(data)))


def chat_seeds() -> list[bytes]:
    """A plain one, and one with everything."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hé 🌸"}]},
    ]
    rich = {
        "model": "tiny", "messages": messages, "temperature": 0.7, "top_p": 0.9, "n": 2, "seed": 7, "stream": True,
        "stream_options": {"include_usage": True}, "stop": ["\n", "END"], "max_completion_tokens": 9, "logprobs": True,
        "top_logprobs": 3, "presence_penalty": 0.5, "frequency_penalty": -0.5, "tools": [], "user": "me",
        "response_format": {"type": "text"}, "logit_bias": {},
    }  # fmt: skip
    return [json.dumps({"model": "tiny", "messages": messages[:1]}).encode(), json.dumps(rich).encode()]


def completion_seeds() -> list[bytes]:
    """Text, ids, several."""
    several = {"model": "tiny", "prompt": ["a", [1, 2, 3]], "max_tokens": 5, "logprobs": 2, "echo": False, "n": 3}
    return [
        json.dumps({"model": "tiny", "prompt": "A cat"}).encode(),
        json.dumps({"model": "tiny", "prompt": [5, 6, 7], "stop": "x"}).encode(),
        json.dumps(several).encode(),
    ]
