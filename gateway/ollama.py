"""Ollama's /api/...: its requests as OpenAI's, and answers in its lines. A translation only."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from petals.gateway.chat_requests import read_chat
from petals.gateway.desk import NO_STORE, Desk, Handler, Respond
from petals.gateway.errors import ApiError
from petals.gateway.fields import Fields
from petals.gateway.generations import Offered
from petals.gateway.output import Piece, Thought, Words
from petals.gateway.request_parser import Wanted, read_completion, read_prompts
from petals.gateway.tools import ToolCall
from petals.gateway.vectors import MAX_INPUTS, embed_all, version
from petals.gateway.writing import LINES, Choice, Head, Usage, line
from petals.peer.client.generation.generation import TokenStream
from petals.peer.client.generation.prompts import chat_template, knows_tools
from petals.peer.client.generation.sampling import Chances
from petals.peer.node import Peer

SPOKEN = "0.12.0"
"""The version of Ollama's API that this is."""

OPTIONS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "typical_p": "typical_p",
    "seed": "seed", "stop": "stop", "repeat_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}  # fmt: skip
"""Ollama's names of what OpenAI and vLLM call otherwise."""
IGNORED_OPTIONS = (
    "num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "low_vram", "use_mmap", "use_mlock",
    "numa", "repeat_last_n", "penalize_newline", "f16_kv", "vocab_only", "draft_num_predict",
)  # fmt: skip


def ollama_routes(desk: Desk, peer: Peer) -> dict[str, tuple[str, Handler]]:
    """Path -> method and handler."""
    return {
        "/api/chat": ("POST", partial(_chat, desk)),
        "/api/generate": ("POST", partial(_generate, desk)),
        "/api/tags": ("GET", partial(_tags, desk, peer)),
        "/api/ps": ("GET", partial(_tags, desk, peer)),
        "/api/show": ("POST", partial(_show, desk, peer)),
        "/api/version": ("GET", _version),
        "/api/embed": ("POST", partial(_embed, desk, peer)),
    }


async def _chat(desk: Desk, request: Request) -> Respond:
    wanted = read_ollama_chat(await desk.read(request), default_new_tokens=desk.config.default_new_tokens)
    return await desk.answer(request, wanted, OllamaChatWriter)


async def _generate(desk: Desk, request: Request) -> Respond:
    body = await desk.read(request)
    if isinstance(body, dict) and not body.get("prompt"):  # how its clients load a model, which is loaded here
        model = await desk.offers.find(str(body.get("model")))
        loaded = {"model": model.name, "created_at": _now(), "response": "", "done": True, "done_reason": "load"}
        return JSONResponse(loaded, headers=NO_STORE)
    wanted = read_ollama_generate(body, default_new_tokens=desk.config.default_new_tokens)
    return await desk.answer(request, wanted, OllamaTextWriter)


def read_ollama_chat(body: object, *, default_new_tokens: int) -> Wanted:
    """
    Raises:
        ApiError: 400, naming the field.
    """
    fields = Fields(body)
    asked = _common(fields)
    asked["tools"] = fields.take("tools")
    messages = fields.take("messages")
    if not isinstance(messages, list):
        fields.refuse("messages", "must be a list")
    asked["messages"] = [_message(each, f"messages[{index}]") for index, each in enumerate(messages)]
    fields.finish()
    return read_chat(_given(asked), default_new_tokens=default_new_tokens)


def read_ollama_generate(body: object, *, default_new_tokens: int) -> Wanted:
    """A prompt is what the user says, unless it is `raw`.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = Fields(body)
    asked = _common(fields)
    prompt, system, raw = fields.text("prompt"), fields.take("system"), fields.flag("raw")
    fields.nothing("suffix", "is not supported: models here only go on", "")
    fields.nothing("template", "is not supported: the model's own is used", "")
    fields.nothing("images", "is not supported: models here neither see nor hear", [])
    fields.nothing("context", "is not supported: send the conversation to /api/chat", [])
    fields.finish()
    if raw:
        for name in ("chat_template_kwargs", "reasoning_effort"):
            asked.pop(name, None)
        return read_completion(
            _given(asked | {"prompt": prompt, "max_tokens": asked["max_tokens"] or default_new_tokens})
        )
    said = [{"role": "user", "content": prompt}]
    if system:
        if not isinstance(system, str):
            fields.refuse("system", "must be a string")
        said.insert(0, {"role": "system", "content": system})
    return read_chat(_given(asked | {"messages": said}), default_new_tokens=default_new_tokens)


def _given(asked: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in asked.items() if value is not None}


def _common(fields: Fields) -> dict[str, Any]:
    """What both have in common, as OpenAI and vLLM spell it."""
    stream = fields.take("stream")
    if stream is not None and not isinstance(stream, bool):
        fields.refuse("stream", "must be true or false")
    asked: dict[str, Any] = {"model": fields.text("model"), "stream": stream is not False}
    options = Fields(fields.take("options") or {}, "options")
    limit = options.integer("num_predict", -2, 1 << 20)
    asked["max_tokens"] = limit if limit is not None and limit > 0 else None
    for name, ours in OPTIONS.items():
        asked[ours] = options.take(name)
    options.nothing("mirostat", "is not supported", 0)
    options.ignore(("mirostat_tau", "mirostat_eta", "tfs_z", *IGNORED_OPTIONS))
    options.finish()
    form = fields.take("format")
    if form == "json":
        asked["response_format"] = {"type": "json_object"}
    elif isinstance(form, dict):
        asked["json_schema"] = form
    elif form not in (None, ""):
        fields.refuse("format", "must be json or a JSON schema")
    think = fields.take("think")
    if isinstance(think, str):
        asked["reasoning_effort"] = think
    elif isinstance(think, bool):
        asked["chat_template_kwargs"] = {"enable_thinking": think}
    elif think is not None:
        fields.refuse("think", "must be true, false, low, medium or high")
    fields.ignore(("keep_alive", "truncate", "shift", "logprobs", "top_logprobs"))
    return asked


def _message(value: object, where: str) -> dict[str, Any]:
    """Ollama's calls have no IDs; a result belongs to the call before it."""
    fields = Fields(value, where)
    message: dict[str, Any] = {"role": fields.take("role"), "content": fields.take("content") or ""}
    fields.nothing("images", "is not supported: models here neither see nor hear", [])
    thought, calls = fields.take("thinking"), fields.take("tool_calls")
    name, number = fields.take("tool_name") or fields.take("name"), fields.take("tool_call_id")
    fields.finish()
    if message["role"] == "tool":
        message |= {"tool_call_id": number or str(name or "call"), **({"name": name} if name else {})}
    if thought and message["role"] == "assistant":
        message["reasoning_content"] = thought
    if calls:
        if not isinstance(calls, list):
            fields.refuse("tool_calls", "must be a list of calls")
        message["tool_calls"] = [_call(each, f"{where}.tool_calls[{index}]") for index, each in enumerate(calls)]
    return message


def _call(value: object, where: str) -> dict[str, Any]:
    fields = Fields(value, where)
    number = fields.take("id")
    function = Fields(fields.take("function"), f"{where}.function")
    name, arguments = function.text("name"), function.take("arguments")
    function.ignore(("index",))
    function.finish()
    called = {"name": name, "arguments": arguments if isinstance(arguments, dict | str) else {}}
    return {"id": number if isinstance(number, str) else name, "type": "function", "function": called}


class OllamaWriter:
    """Lines of JSON, the last with counts and times in nanoseconds."""

    content_type = LINES

    def __init__(self, head: Head, wanted: Wanted) -> None:
        self._head = head
        self._began = time.perf_counter()

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        choice = choices[0]
        return {**self._top(), **self._said(choice.parts), **self._done(choice)}

    def begin(self) -> Iterable[bytes]:
        return ()

    def opening(self, choice: Choice) -> Iterable[bytes]:
        return ()

    def step(self, choice: Choice, pieces: Sequence[Piece], chances: Chances | None) -> Iterable[bytes]:
        if pieces:
            yield line({**self._top(), **self._said(pieces), "done": False})

    def closing(self, choice: Choice) -> Iterable[bytes]:
        yield line({**self._top(), **self._said(()), **self._done(choice)})

    def end(self, choices: Sequence[Choice]) -> Iterable[bytes]:
        return ()

    def route(self, stream: TokenStream) -> Iterable[bytes]:
        return ()

    def failed(self, error: ApiError) -> Iterable[bytes]:
        yield line({"error": str(error)})

    def _said(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        raise NotImplementedError

    def _top(self) -> dict[str, Any]:
        return {"model": self._head.model, "created_at": _now()}

    def _done(self, choice: Choice) -> dict[str, Any]:
        usage = Usage.of([choice], 1)
        seconds = None if choice.stream is None else choice.stream.seconds
        return {
            "done": True,
            "done_reason": "length" if choice.finish_reason == "length" else "stop",
            "total_duration": int(1e9 * (time.perf_counter() - self._began)),
            "load_duration": int(1e9 * seconds.prepare) if seconds else 0,
            "prompt_eval_count": usage.prompt,
            "prompt_eval_duration": int(1e9 * seconds.first_token) if seconds else 0,
            "eval_count": usage.new,
            "eval_duration": int(1e9 * seconds.decode) if seconds else 0,
        }


class OllamaChatWriter(OllamaWriter):
    """/api/chat."""

    def _said(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": _words(pieces)}
        if thoughts := _thoughts(pieces):
            message["thinking"] = thoughts
        calls = [
            {"id": each.id, "function": {"name": each.name, "arguments": json.loads(each.arguments)}}
            for each in pieces
            if isinstance(each, ToolCall)
        ]
        return {"message": message | ({"tool_calls": calls} if calls else {})}


class OllamaTextWriter(OllamaWriter):
    """/api/generate."""

    def _said(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        thoughts = _thoughts(pieces)
        return {"response": _words(pieces), **({"thinking": thoughts} if thoughts else {})}


def _words(pieces: Sequence[Piece]) -> str:
    return "".join(each.text for each in pieces if isinstance(each, Words))


def _thoughts(pieces: Sequence[Piece]) -> str:
    return "".join(each.text for each in pieces if isinstance(each, Thought))


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


async def _tags(desk: Desk, peer: Peer, request: Request) -> Response:
    """All models are there and running: the swarm holds them."""
    models = []
    for model in await desk.offers.all():
        models.append(
            {
                "name": model.name,
                "model": model.name,
                "modified_at": datetime.fromtimestamp(desk.offers.opened, UTC).isoformat(),
                "size": 0,
                "size_vram": 0,
                "digest": model.digest,
                "expires_at": "9999-12-31T23:59:59Z",
                "context_length": await desk.offers.max_length(model),
                "details": await _details(peer, model),
            }
        )
    return JSONResponse({"models": models}, headers=NO_STORE)


async def _details(peer: Peer, model: Offered) -> dict[str, Any]:
    client = await peer.client(model.argument)
    family = client.checkpoint.config.model_type
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": "",
    }


async def _show(desk: Desk, peer: Peer, request: Request) -> Response:
    fields = Fields(await desk.read(request))
    name = fields.take("model") or fields.take("name")
    fields.ignore(("name", "verbose", "system", "template", "options"))
    fields.finish()
    model = await desk.offers.find(name if isinstance(name, str) else "")
    client = await peer.client(model.argument)
    _, tokenizer = await client.language_model(peer.asking.head_quant)
    template = chat_template(tokenizer, tools=True) or ""
    config = client.checkpoint.config.get_text_config()
    family = client.checkpoint.config.model_type
    capabilities = ["completion", "embedding"]
    if template and knows_tools(template):
        capabilities.append("tools")
    if "</think>" in template or "<|channel|>" in template:
        capabilities.append("thinking")
    shown = {
        "modelfile": "",
        "parameters": "",
        "license": "",
        "template": template,
        "details": await _details(peer, model),
        "model_info": {
            "general.architecture": family,
            "general.basename": model.name,
            f"{family}.context_length": await desk.offers.max_length(model),
            f"{family}.block_count": client.checkpoint.num_blocks,
            f"{family}.embedding_length": config.hidden_size,
        },
        "capabilities": capabilities,
        "modified_at": datetime.fromtimestamp(desk.offers.opened, UTC).isoformat(),
    }
    return JSONResponse(shown, headers=NO_STORE)


async def _embed(desk: Desk, peer: Peer, request: Request) -> Response:
    began = time.perf_counter()
    fields = Fields(await desk.read(request))
    name, inputs = fields.text("model"), read_prompts(fields, "input", MAX_INPUTS)
    fields.nothing("dimensions", "is not supported: a vector has as many numbers as the model's hidden states")
    fields.ignore(("truncate", "options", "keep_alive"))
    fields.finish()
    vectors, tokens = await embed_all(desk, peer, request, name, inputs, "mean")
    took = int(1e9 * (time.perf_counter() - began))
    body = {"model": name, "embeddings": vectors, "total_duration": took, "prompt_eval_count": tokens}
    return JSONResponse(body, headers=NO_STORE)


async def _version(request: Request) -> Response:
    return JSONResponse({"version": SPOKEN, "petals": version()}, headers=NO_STORE)
