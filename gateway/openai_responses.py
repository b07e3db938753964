"""OpenAI's /v1/responses: its requests as chats, and answers as items with their events. A translation only; nothing
is kept between requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request

from petals.gateway.chat_requests import read_chat
from petals.gateway.desk import Desk, Handler, Respond
from petals.gateway.errors import ApiError
from petals.gateway.fields import Fields
from petals.gateway.output import Piece, Thought, Words
from petals.gateway.request_parser import MAX_TOKENS, Wanted
from petals.gateway.tools import ToolCall, ToolUse, read_tools
from petals.gateway.writing import EVENTS, Choice, Head, Usage, event
from petals.peer.client.generation.generation import TokenStream
from petals.peer.client.generation.sampling import Chances

MAX_ITEMS = 4096
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "chat_template_kwargs",
)  # fmt: skip
IGNORED = (
    "store", "metadata", "include", "truncation", "user", "service_tier", "prompt_cache_key", "safety_identifier",
    "prompt_cache_retention", "max_tool_calls", "context_management", "moderation", "prompt_cache_options",
)  # fmt: skip


def responses_routes(desk: Desk) -> dict[str, tuple[str, Handler]]:
    """Path -> method and handler."""
    return {"/v1/responses": ("POST", partial(_responses, desk))}


async def _responses(desk: Desk, request: Request) -> Respond:
    wanted = read_response(await desk.read(request), default_new_tokens=desk.config.default_new_tokens)
    return await desk.answer(request, wanted, ResponsesWriter)


def read_response(body: object, *, default_new_tokens: int) -> Wanted:
    """
    Raises:
        ApiError: 400, naming the field.
    """
    fields = Fields(body)
    stored = "is not supported: a peer keeps no conversations; send the whole of it"
    for name in ("previous_response_id", "conversation", "prompt"):
        fields.nothing(name, stored)
    fields.nothing("background", "is not supported", False)
    fields.nothing("top_logprobs", "is not supported here: use /v1/chat/completions", 0)
    instructions = fields.take("instructions")
    messages = _read_input(fields)
    if instructions:
        if not isinstance(instructions, str):
            fields.refuse("instructions", "must be a string")
        messages.insert(0, {"role": "system", "content": instructions})
    use = read_tools(fields, flat=True)
    asked: dict[str, Any] = {
        "model": fields.text("model"),
        "messages": messages,
        "max_tokens": fields.integer("max_output_tokens", 1, MAX_TOKENS),
        "stream": fields.flag("stream"),
        **{name: fields.take(name) for name in SAMPLING},
        **_as_chat_tools(use),
        **_text_format(fields),
        **_reasoning(fields),
    }
    fields.ignore(("stream_options", *IGNORED))
    fields.finish()
    given = {name: value for name, value in asked.items() if value is not None}
    return read_chat(given, default_new_tokens=default_new_tokens)


def _as_chat_tools(use: ToolUse) -> dict[str, Any]:
    if not use.tools:
        return {}
    tools = []
    for tool in use.tools:
        described = tool.as_template()
        described["function"]["strict"] = tool.strict
        tools.append(described)
    named = {"type": "function", "function": {"name": use.only}}
    return {"tools": tools, "tool_choice": named if use.only else use.mode, "parallel_tool_calls": use.parallel}


def _text_format(fields: Fields) -> dict[str, Any]:
    value = fields.take("text")
    if value is None:
        return {}
    about = Fields(value, "text")
    form = about.take("format")
    about.ignore(("verbosity",))
    about.finish()
    if form is None:
        return {}
    inner = Fields(form, "text.format")
    kind = inner.take("type")
    if kind == "json_schema":
        schema = inner.take("schema")
        if not isinstance(schema, dict | bool):
            inner.refuse("schema", "must be a JSON schema")
        inner.ignore(("name", "description", "strict"))
        inner.finish()
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}
    if kind not in ("text", "json_object"):
        inner.refuse("type", "must be text, json_object or json_schema")
    inner.finish()
    return {"response_format": {"type": kind}}


def _reasoning(fields: Fields) -> dict[str, Any]:
    value = fields.take("reasoning")
    if value is None:
        return {}
    about = Fields(value, "reasoning")
    effort = about.take("effort")
    about.ignore(("summary", "generate_summary"))
    about.finish()
    return {"reasoning_effort": effort}


def _read_input(fields: Fields) -> list[dict[str, Any]]:
    """Items as messages; calls and thoughts belong to the assistant's message around them."""
    value = fields.take("input")
    if isinstance(value, str):
        return [{"role": "user", "content": fields.proper("input", value)}]
    if not isinstance(value, list) or not 0 < len(value) <= MAX_ITEMS:
        fields.refuse("input", f"must be a string, or a list of 1 to {MAX_ITEMS} items")
    messages: list[dict[str, Any]] = []
    thought = ""
    for index, each in enumerate(value):
        item = Fields(each, f"input[{index}]")
        kind = item.take("type")
        if kind in (None, "message"):
            message = {"role": item.take("role"), "content": _content(item, f"input[{index}]")}
            if thought and message["role"] == "assistant":
                message["reasoning_content"], thought = thought, ""
            messages.append(message)
        elif kind == "function_call":
            _add_call(messages, item, thought)
            thought = ""
        elif kind == "function_call_output":
            output = item.take("output")
            text = output if isinstance(output, str) else _parts(item, "output", output, f"input[{index}]")
            messages.append({"role": "tool", "tool_call_id": item.text("call_id"), "content": text})
        elif kind == "reasoning":
            thought = _thought(item)
        else:
            item.refuse("type", "must be message, function_call, function_call_output or reasoning")
        item.ignore(("id", "status", "phase"))
        item.finish()
    return messages


def _add_call(messages: list[dict[str, Any]], item: Fields, thought: str) -> None:
    function = {"name": item.text("name"), "arguments": item.text("arguments")}
    call = {"id": item.text("call_id"), "type": "function", "function": function}
    item.ignore(("namespace", "caller"))
    if not (messages and messages[-1]["role"] == "assistant"):
        messages.append({"role": "assistant", "content": ""})
    if thought:
        messages[-1].setdefault("reasoning_content", thought)
    messages[-1].setdefault("tool_calls", []).append(call)


def _thought(item: Fields) -> str:
    content = item.take("content") or []
    item.ignore(("summary", "encrypted_content"))
    if not isinstance(content, list):
        item.refuse("content", "must be a list of parts")
    return "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)


def _content(item: Fields, where: str) -> str:
    content = item.take("content")
    return item.proper("content", content) if isinstance(content, str) else _parts(item, "content", content, where)


def _parts(item: Fields, name: str, parts: object, where: str) -> str:
    if not isinstance(parts, list) or len(parts) > MAX_ITEMS:
        item.refuse(name, "must be a string, or a list of parts")
    texts = []
    for index, each in enumerate(parts):
        part = Fields(each, f"{where}.{name}[{index}]")
        kind = part.take("type")
        if kind not in ("input_text", "output_text", "refusal"):
            part.refuse("type", "must be input_text or output_text: models here neither see nor hear")
        texts.append(part.text("refusal" if kind == "refusal" else "text"))
        part.ignore(("annotations", "logprobs"))
        part.finish()
    return "\n".join(texts)


class ResponsesWriter:
    """An answer as items: reasoning, a message, function calls."""

    content_type = EVENTS

    def __init__(self, head: Head, wanted: Wanted) -> None:
        self._head = head
        self._wanted = wanted
        self._number = -1
        self._item: dict[str, Any] | None = None
        """The one that is being written."""
        self._items: list[dict[str, Any]] = []

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        choice = choices[0]
        items = [self._finished(part, index) for index, part in enumerate(choice.parts)]
        return self._response(choice, items)

    def begin(self) -> Iterable[bytes]:
        return ()

    def opening(self, choice: Choice) -> Iterable[bytes]:
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._response(None, []))

    def step(self, choice: Choice, pieces: Sequence[Piece], chances: Chances | None) -> Iterable[bytes]:
        for piece in pieces:
            if self._item is None or isinstance(piece, ToolCall) or _type(piece) != self._item["type"]:
                yield from self._close()
                yield from self._open(piece)
            yield from self._delta(piece)

    def closing(self, choice: Choice) -> Iterable[bytes]:
        yield from self._close()
        response = self._response(choice, self._items)
        yield self._event(f"response.{response['status']}", response=response)

    def end(self, choices: Sequence[Choice]) -> Iterable[bytes]:
        return ()

    def route(self, stream: TokenStream) -> Iterable[bytes]:
        return ()

    def failed(self, error: ApiError) -> Iterable[bytes]:
        response = self._response(None, self._items)
        failure = {"code": error.code or "server_error", "message": str(error)}
        yield self._event("response.failed", response=response | {"status": "failed", "error": failure})

    def _open(self, piece: Piece) -> Iterable[bytes]:
        item = self._finished(piece, len(self._items))
        self._item = item | {"status": "in_progress"}
        if isinstance(piece, ToolCall):
            self._item["arguments"] = ""
        else:
            self._item["content"] = []
        yield self._event("response.output_item.added", output_index=len(self._items), item=self._item)
        if not isinstance(piece, ToolCall):
            part = item["content"][0] | {"text": ""}
            self._item["content"] = [part]
            yield self._event("response.content_part.added", **self._place(), part=part)

    def _delta(self, piece: Piece) -> Iterable[bytes]:
        assert self._item is not None
        match piece:
            case ToolCall():
                self._item["arguments"] = piece.arguments
                place = {"item_id": self._item["id"], "output_index": len(self._items)}
                yield self._event("response.function_call_arguments.delta", **place, delta=piece.arguments)
            case Words(text) | Thought(text):
                self._item["content"] = [self._item["content"][0] | {"text": self._item["content"][0]["text"] + text}]
                logprobs: dict[str, Any] = {"logprobs": []} if isinstance(piece, Words) else {}
                yield self._event(f"response.{_part(piece)}.delta", **self._place(), delta=text, **logprobs)

    def _close(self) -> Iterable[bytes]:
        item, self._item = self._item, None
        if item is None:
            return
        index = len(self._items)
        item["status"] = "completed"
        if item["type"] == "function_call":
            done = {"item_id": item["id"], "output_index": index, "arguments": item["arguments"], "name": item["name"]}
            yield self._event("response.function_call_arguments.done", **done)
        else:
            part = item["content"][0]
            place = {"item_id": item["id"], "output_index": index, "content_index": 0}
            logprobs: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
            yield self._event(f"response.{part['type']}.done", **place, text=part["text"], **logprobs)
            yield self._event("response.content_part.done", **place, part=part)
        self._items.append(item)
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self._items), "content_index": 0}

    def _event(self, name: str, /, **data: Any) -> bytes:
        self._number += 1
        return event({"type": name, "sequence_number": self._number, **data}, name)

    def _finished(self, part: Piece, index: int) -> dict[str, Any]:
        number = f"{self._head.id}{index}"
        match part:
            case Words(text):
                content = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
                said = {"id": f"msg_{number}", "type": "message", "role": "assistant"}
                return {**said, "status": "completed", "content": [content]}
            case Thought(text):
                content = {"type": "reasoning_text", "text": text}
                about: dict[str, Any] = {"id": f"rs_{number}", "type": "reasoning", "summary": []}
                return {**about, "status": "completed", "content": [content]}
            case ToolCall():
                called = {"call_id": part.id, "name": part.name, "arguments": part.arguments}
                return {"id": f"fc_{number}", "type": "function_call", "status": "completed", **called}

    def _response(self, choice: Choice | None, items: list[dict[str, Any]]) -> dict[str, Any]:
        """`choice` None: it has not ended."""
        cut = choice is not None and choice.finish_reason == "length"
        options, use = self._wanted.options, self._wanted.tools
        return {
            "id": f"resp_{self._head.id}",
            "object": "response",
            "created_at": self._head.created,
            "status": "in_progress" if choice is None else "incomplete" if cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": None,
            "max_output_tokens": options.max_new_tokens,
            "metadata": {},
            "model": self._head.model,
            "output": items,
            "parallel_tool_calls": use.parallel,
            "previous_response_id": None,
            "store": False,
            "temperature": options.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": {"type": "function", "name": use.only} if use.only else use.mode,
            "tools": [_flat(tool.as_template()) for tool in use.tools],
            "top_p": options.top_p,
            "truncation": "disabled",
            "usage": None if choice is None else _usage(choice),
        }


def _flat(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "strict": False, **tool["function"]}


def _usage(choice: Choice) -> dict[str, Any]:
    usage = Usage.of([choice], 1)
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.kept},
        "output_tokens": usage.new,
        "output_tokens_details": {"reasoning_tokens": choice.thought_tokens},
        "total_tokens": usage.prompt + usage.new,
    }


def _type(piece: Piece) -> str:
    return {Words: "message", Thought: "reasoning", ToolCall: "function_call"}[type(piece)]


def _part(piece: Words | Thought) -> str:
    return "output_text" if isinstance(piece, Words) else "reasoning_text"
