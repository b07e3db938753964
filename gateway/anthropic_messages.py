"""Anthropic's /v1/messages: its requests as OpenAI's, and answers in its words. A translation only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from petals.gateway.chat_requests import read_chat
from petals.gateway.desk import NO_STORE, Desk, Handler, Respond
from petals.gateway.errors import ApiError, as_api_error, error_body
from petals.gateway.fields import Fields
from petals.gateway.output import Piece, Thought, Words
from petals.gateway.request_parser import MAX_TOKENS, Wanted
from petals.gateway.tools import ToolCall, read_schema
from petals.gateway.writing import EVENTS, Choice, Head, Usage, event
from petals.peer.client.generation.generation import TokenStream
from petals.peer.client.generation.prompts import tokenise
from petals.peer.client.generation.sampling import Chances
from petals.peer.node import Peer

MAX_BLOCKS = 4096
IGNORED = ("metadata", "service_tier", "context_management", "betas", "container", "inference_geo", "cache_control",
           "speed", "diagnostics")  # fmt: skip
STOPPED = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def anthropic_routes(desk: Desk, peer: Peer) -> dict[str, tuple[str, Handler]]:
    """Path -> method and handler."""
    return {
        "/v1/messages": ("POST", partial(_messages, desk)),
        "/v1/messages/count_tokens": ("POST", partial(_count, desk, peer)),
    }


async def _messages(desk: Desk, request: Request) -> Respond:
    wanted = read_messages_request(await desk.read(request))
    return await desk.answer(request, wanted, MessagesWriter)


async def _count(desk: Desk, peer: Peer, request: Request) -> Response:
    wanted = read_messages_request(await desk.read(request), counted=True)
    client = await peer.client((await desk.offers.find(wanted.model)).argument)
    _, tokenizer = await client.language_model(peer.asking.head_quant)
    try:
        ids = await trio.to_thread.run_sync(tokenise, tokenizer, wanted.prompts[0], client.checkpoint)
    except Exception as error:
        raise as_api_error(error) from error
    return JSONResponse({"input_tokens": len(ids)}, headers=NO_STORE)


def read_messages_request(body: object, *, counted: bool = False) -> Wanted:
    """
    Args:
        counted: only the prompt's tokens are wanted: max_tokens need not be there.
    Raises:
        ApiError: 400, naming the field.
    """
    fields = Fields(body)
    limit = fields.integer("max_tokens", 1, MAX_TOKENS)
    if limit is None and not counted:
        fields.refuse("max_tokens", "must be there")
    asked: dict[str, Any] = {
        "model": fields.text("model"),
        "max_tokens": limit,
        "messages": [*_system(fields), *_read_messages(fields)],
        "temperature": fields.number("temperature", 0, 1),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", 0, 1 << 30),
        "stop": fields.take("stop_sequences"),
        "stream": fields.flag("stream"),
        **_tools(fields),
        **_thinking(fields),
    }
    fields.nothing("mcp_servers", "is not supported", [])
    fields.ignore(IGNORED)
    fields.finish()
    return read_chat({name: value for name, value in asked.items() if value is not None}, default_new_tokens=1)


def _system(fields: Fields) -> list[dict[str, Any]]:
    value = fields.take("system")
    if not value:
        return []
    return [{"role": "system", "content": _text(fields, "system", value)}]


def _text(fields: Fields, name: str, value: object) -> str:
    """A text, or blocks of text."""
    if isinstance(value, str):
        return fields.proper(name, value)
    if not isinstance(value, list) or len(value) > MAX_BLOCKS:
        fields.refuse(name, "must be a string, or a list of text blocks")
    texts = []
    for index, each in enumerate(value):
        block = Fields(each, f"{name}[{index}]")
        if block.take("type") != "text":
            block.refuse("type", "must be text: models here neither see nor hear", code="unsupported_parameter")
        texts.append(block.text("text"))
        block.ignore(("cache_control", "citations"))
        block.finish()
    return "\n".join(texts)


def _read_messages(fields: Fields) -> list[dict[str, Any]]:
    value = fields.take("messages")
    if not isinstance(value, list) or not 0 < len(value) <= MAX_BLOCKS:
        fields.refuse("messages", f"must be a list of 1 to {MAX_BLOCKS} messages")
    made: list[dict[str, Any]] = []
    for index, each in enumerate(value):
        where = f"messages[{index}]"
        message = Fields(each, where)
        role, content = message.take("role"), message.take("content")
        if role not in ("user", "assistant", "system"):
            message.refuse("role", "must be user or assistant")
        message.finish()
        if isinstance(content, str):
            made.append({"role": role, "content": message.proper("content", content)})
        elif isinstance(content, list) and len(content) <= MAX_BLOCKS:
            blocks = [Fields(block, f"{where}.content[{number}]") for number, block in enumerate(content)]
            made += _assistant(blocks) if role == "assistant" else _user(str(role), blocks)
        else:
            message.refuse("content", "must be a string, or a list of blocks")
    return made


def _user(role: str, blocks: list[Fields]) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, in front of what the user says."""
    results: list[dict[str, Any]] = []
    texts = []
    for block in blocks:
        kind = block.take("type")
        if kind == "text":
            texts.append(block.text("text"))
            block.ignore(("citations",))
        elif kind == "tool_result":
            content = block.take("content")
            text = _text(block, "content", content) if content else ""
            if block.flag("is_error"):
                text = f"error: {text}"
            results.append({"role": "tool", "tool_call_id": block.text("tool_use_id"), "content": text})
        else:
            block.refuse("type", "must be text or tool_result: models here neither see nor hear")
        block.ignore(("cache_control",))
        block.finish()
    return [*results, {"role": role, "content": "\n".join(texts)}] if texts or not results else results


def _assistant(blocks: list[Fields]) -> list[dict[str, Any]]:
    texts, thoughts, calls = [], [], []
    for block in blocks:
        kind = block.take("type")
        if kind == "text":
            texts.append(block.text("text"))
            block.ignore(("citations",))
        elif kind == "thinking":
            thoughts.append(block.text("thinking"))
            block.ignore(("signature",))
        elif kind == "redacted_thinking":
            block.ignore(("data",))
        elif kind == "tool_use":
            arguments = block.take("input")
            if not isinstance(arguments, dict):
                block.refuse("input", "must be an object")
            function = {"name": block.text("name"), "arguments": arguments}
            calls.append({"id": block.text("id"), "type": "function", "function": function})
            block.ignore(("caller",))
        else:
            block.refuse("type", "must be text, thinking or tool_use")
        block.ignore(("cache_control",))
        block.finish()
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [message]


def _tools(fields: Fields) -> dict[str, Any]:
    """`tools` and `tool_choice` as OpenAI spells them."""
    value = fields.take("tools")
    choice = fields.take("tool_choice")
    if not value:
        return {}
    if not isinstance(value, list):
        fields.refuse("tools", "must be a list")
    tools = []
    for index, each in enumerate(value):
        tool = Fields(each, f"tools[{index}]")
        if tool.take("type") not in (None, "custom"):
            tool.refuse("type", "must be custom: a peer has no tools of its own", code="unsupported_parameter")
        function = {
            "name": tool.text("name"),
            "description": tool.take("description"),
            "strict": tool.flag("strict"),
            "parameters": read_schema(tool, "input_schema"),
        }
        tool.ignore(("cache_control", "defer_loading", "allowed_callers", "input_examples", "eager_input_streaming"))
        tool.finish()
        tools.append({"type": "function", "function": function})
    made: dict[str, Any] = {"tools": tools}
    if choice is not None:
        about = Fields(choice, "tool_choice")
        kind = about.take("type")
        if kind == "tool":
            made["tool_choice"] = {"type": "function", "function": {"name": about.text("name")}}
        elif kind in ("auto", "any", "none"):
            made["tool_choice"] = "required" if kind == "any" else kind
        else:
            about.refuse("type", "must be auto, any, tool or none")
        made["parallel_tool_calls"] = not about.flag("disable_parallel_tool_use")
        about.finish()
    return made


def _thinking(fields: Fields) -> dict[str, Any]:
    """Whether to think, how hard, and in which form to answer."""
    made: dict[str, Any] = {}
    value = fields.take("thinking")
    if value is not None:
        about = Fields(value, "thinking")
        kind = about.take("type")
        if kind not in ("enabled", "disabled", "adaptive"):
            about.refuse("type", "must be enabled, disabled or adaptive")
        about.ignore(("budget_tokens", "display"))
        about.finish()
        made["chat_template_kwargs"] = {"enable_thinking": kind != "disabled"}
    outputs = fields.take("output_config")
    form = fields.take("output_format")
    if outputs is not None:
        about = Fields(outputs, "output_config")
        effort = about.take("effort")
        made["reasoning_effort"] = {"max": "xhigh"}.get(effort, effort) if isinstance(effort, str) else None
        form = about.take("format") or form
        about.ignore(("task_budget",))
        about.finish()
    if form is not None:
        about = Fields(form, "output_config.format")
        if about.take("type") != "json_schema":
            about.refuse("type", "must be json_schema")
        schema = about.take("schema")
        about.finish()
        made["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return made


class MessagesWriter:
    """An answer as Anthropic's clients read it: blocks of thoughts, text and tool use."""

    content_type = EVENTS

    def __init__(self, head: Head, wanted: Wanted) -> None:
        self._head = head
        self._block = -1
        """Index of the block that is being written."""
        self._kind: type[Piece] | None = None

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        choice = choices[0]
        return {
            **self._message(),
            "content": [_block(part) for part in choice.parts],
            **_stopped(choice),
            "usage": self._usage(choices),
        }

    def begin(self) -> Iterable[bytes]:
        return ()

    def opening(self, choice: Choice) -> Iterable[bytes]:
        usage = self._usage([choice])
        message = {**self._message(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield _event("message_start", message=message)

    def step(self, choice: Choice, pieces: Sequence[Piece], chances: Chances | None) -> Iterable[bytes]:
        for piece in pieces:
            if type(piece) is not self._kind or isinstance(piece, ToolCall):
                yield from self._close()
                self._block += 1
                self._kind = type(piece)
                yield _event("content_block_start", index=self._block, content_block=_empty(piece))
            yield _event("content_block_delta", index=self._block, delta=_delta(piece))

    def closing(self, choice: Choice) -> Iterable[bytes]:
        yield from self._close()
        yield _event("message_delta", delta=_stopped(choice), usage=self._usage([choice]))

    def end(self, choices: Sequence[Choice]) -> Iterable[bytes]:
        yield _event("message_stop")

    def route(self, stream: TokenStream) -> Iterable[bytes]:
        return ()

    def failed(self, error: ApiError) -> Iterable[bytes]:
        yield event(error_body("/v1/messages", error), "error")

    def _close(self) -> Iterable[bytes]:
        if self._kind is not None:
            self._kind = None
            yield _event("content_block_stop", index=self._block)

    def _message(self) -> dict[str, Any]:
        return {"id": f"msg_{self._head.id}", "type": "message", "role": "assistant", "model": self._head.model}

    def _usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        usage = Usage.of(choices, self._head.n)
        return {
            "input_tokens": usage.prompt - usage.kept,
            "output_tokens": usage.new,
            "cache_read_input_tokens": usage.kept,
            "cache_creation_input_tokens": 0,
        }


def _event(name: str, /, **data: Any) -> bytes:
    return event({"type": name, **data}, name)


def _stopped(choice: Choice) -> dict[str, Any]:
    if choice.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_string}
    return {"stop_reason": STOPPED[choice.finish_reason], "stop_sequence": None}


def _block(part: Piece) -> dict[str, Any]:
    match part:
        case Words(text):
            return {"type": "text", "text": text}
        case Thought(text):
            return {"type": "thinking", "thinking": text, "signature": ""}
        case ToolCall():
            return {"type": "tool_use", "id": part.id, "name": part.name, "input": json.loads(part.arguments)}


def _empty(piece: Piece) -> dict[str, Any]:
    block = _block(piece)
    return block | {key: type(block[key])() for key in ("text", "thinking", "input") if key in block}


def _delta(piece: Piece) -> dict[str, Any]:
    match piece:
        case Words(text):
            return {"type": "text_delta", "text": text}
        case Thought(text):
            return {"type": "thinking_delta", "thinking": text}
        case ToolCall():
            return {"type": "input_json_delta", "partial_json": piece.arguments}
