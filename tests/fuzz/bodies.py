"""What an HTTP client can send: bodies of OpenAI's, Anthropic's and Ollama's requests."""

from __future__ import annotations

import json
from contextlib import suppress

from petals.gateway.anthropic_messages import read_messages_request
from petals.gateway.chat_requests import read_chat
from petals.gateway.errors import ApiError
from petals.gateway.fields import parse_json
from petals.gateway.ollama import read_ollama_chat, read_ollama_generate
from petals.gateway.openai_responses import read_response
from petals.gateway.request_parser import Wanted, read_completion


def _check(wanted: Wanted) -> None:
    assert 1 <= len(wanted.choices()) <= 16
    assert isinstance(wanted.model, str)


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


def messages(data: bytes) -> None:
    """POST /v1/messages."""
    with suppress(ApiError):
        _check(read_messages_request(parse_json(data)))


def response(data: bytes) -> None:
    """POST /v1/responses."""
    with suppress(ApiError):
        _check(read_response(parse_json(data), default_new_tokens=64))


def ollama(data: bytes) -> None:
    """POST /api/chat and /api/generate."""
    for read in (read_ollama_chat, read_ollama_generate):
        with suppress(ApiError):
            _check(read(parse_json(data), default_new_tokens=64))


TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}


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
        "response_format": {"type": "text"}, "logit_bias": {"5": -1}, "min_p": 0.1, "min_tokens": 1,
    }  # fmt: skip
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
    history = [
        *messages,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "x"}]},
    ]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True}}
    tools = {"tools": [{"type": "function", "function": TOOL | {"strict": True}}], "tool_choice": "required"}
    called = {"model": "tiny", "messages": history, **tools, "response_format": form, "reasoning_effort": "low"}
    return [json.dumps(each).encode() for each in ({"model": "tiny", "messages": messages[:1]}, rich, called)]


def messages_seeds() -> list[bytes]:
    """Blocks of every kind."""
    history = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "h", "signature": ""},
                                          {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "y", "is_error": True}]},
    ]  # fmt: skip
    asked = {
        "model": "tiny", "max_tokens": 9, "messages": history, "system": [{"type": "text", "text": "s"}],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any"},
        "stop_sequences": ["E"], "thinking": {"type": "enabled", "budget_tokens": 9}, "stream": True, "top_k": 4,
    }  # fmt: skip
    return [json.dumps(asked).encode()]


def response_seeds() -> list[bytes]:
    """Items of every kind."""
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "h"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "y"},
    ]
    form = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}
    tools = {"tools": [{"type": "function", **TOOL}], "tool_choice": {"type": "function", "name": "f"}}
    asked = {"model": "tiny", "input": items, "instructions": "s", "text": form, "reasoning": {"effort": "low"}}
    return [json.dumps(asked | tools).encode(), json.dumps({"model": "tiny", "input": "x"}).encode()]


def ollama_seeds() -> list[bytes]:
    """A chat with calls, and a prompt."""
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    history = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call], "thinking": "h"},
        {"role": "tool", "tool_name": "f", "content": "y"},
    ]
    options = {"num_predict": 4, "temperature": 0.5, "repeat_penalty": 1.1, "num_ctx": 9, "stop": ["E"]}
    chat = {"model": "tiny", "messages": history, "options": options, "format": "json", "think": "low"}
    prompt = {"model": "tiny", "prompt": "x", "raw": True, "stream": False, "keep_alive": "5m", "options": options}
    return [json.dumps(chat).encode(), json.dumps(prompt).encode()]


def completion_seeds() -> list[bytes]:
    """Text, ids, several."""
    several = {"model": "tiny", "prompt": ["a", [1, 2, 3]], "max_tokens": 5, "logprobs": 2, "echo": False, "n": 3}
    return [
        json.dumps({"model": "tiny", "prompt": "A cat"}).encode(),
        json.dumps({"model": "tiny", "prompt": [5, 6, 7], "stop": "x"}).encode(),
        json.dumps(several).encode(),
    ]
