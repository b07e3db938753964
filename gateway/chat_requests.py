"""POST /v1/chat/completions -> what the peer is asked for. Pure."""

from __future__ import annotations

import json
from typing import Any

from petals.gateway.fields import Fields
from petals.gateway.request_parser import MAX_TOKENS, Wanted, read_common
from petals.gateway.tools import ToolUse, read_tools
from petals.peer.client.generation.generation_options import GenerationOptions
from petals.peer.client.generation.prompts import Chat

MAX_MESSAGES = 4096
MAX_TOP_CHAT = 20
MAX_TEMPLATE_ARGUMENTS = 64

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
"""Arguments of a chat template that a request has fields of its own for."""


def read_chat(body: object, *, default_new_tokens: int) -> Wanted:
    """
    Raises:
        ApiError: 400, naming the field.
    """
    fields = Fields(body)
    messages = read_messages(fields)
    use = read_tools(fields)
    limit = fields.integer("max_completion_tokens", 1, MAX_TOKENS)
    old_limit = fields.integer("max_tokens", 1, MAX_TOKENS)
    limit = old_limit if limit is None else limit
    logprobs, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MAX_TOP_CHAT)
    if top is not None and not logprobs:
        fields.refuse("top_logprobs", "needs logprobs to be true")
    fields.nothing("functions", "is not supported: send tools", [])
    fields.nothing("function_call", "is not supported: send tool_choice", "none", "auto")
    fields.nothing("modalities", "is not supported: answers are text", ["text"])
    fields.nothing("audio", "is not supported: answers are text")
    fields.nothing("prediction", "is not supported")
    fields.nothing("web_search_options", "is not supported")
    fields.nothing("echo", "is not supported in chats", False)
    fields.ignore(("verbosity",))
    chat = Chat(
        messages,
        tools=tuple(tool.as_template() for tool in use.offered),
        arguments=template_arguments(fields),
        continues=read_continues(fields, messages),
    )
    options = GenerationOptions(
        max_new_tokens=limit or default_new_tokens, fit=limit is None, logprobs=(top or 0) if logprobs else None
    )
    return read_common(fields, chat_wanted(chat, options, use))


def chat_wanted(chat: Chat, options: GenerationOptions, use: ToolUse) -> Wanted:
    """A request for one answer in a chat."""
    return Wanted(
        model="",
        chat=True,
        prompts=(chat,),
        n=1,
        options=options,
        stream=False,
        include_usage=False,
        include_route=False,
        tools=use,
    )


def template_arguments(fields: Fields) -> dict[str, Any]:
    """What the model's template is given beside the messages: `chat_template_kwargs` and `reasoning_effort`."""
    value = fields.take("chat_template_kwargs")
    fields.nothing("chat_template", "is not supported: the model's own is used")
    fields.nothing("documents", "is not supported: put them into a message", [])
    effort = fields.take("reasoning_effort")
    if effort is not None and effort not in EFFORTS:
        fields.refuse("reasoning_effort", f"must be one of {', '.join(EFFORTS)}")
    if value is not None and (not isinstance(value, dict) or len(value) > MAX_TEMPLATE_ARGUMENTS):
        fields.refuse("chat_template_kwargs", f"must be an object of at most {MAX_TEMPLATE_ARGUMENTS} arguments")
    arguments = dict(value or {})
    for name in arguments:
        if name in RESERVED or not name.isidentifier():
            fields.refuse("chat_template_kwargs", f"may not have {name!r}")
    return arguments | effort_arguments(effort)


def effort_arguments(effort: str | None) -> dict[str, Any]:
    """How templates spell an effort: gpt-oss reads `reasoning_effort`; Qwen and others only whether to think."""
    if effort is None:
        return {}
    return {"reasoning_effort": effort, "enable_thinking": effort != "none"}


def read_continues(fields: Fields, messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is the beginning of the answer. It is when the assistant said it last, as with other
    servers, unless the request says otherwise."""
    said = fields.take("continue_final_message")
    prompts = fields.take("add_generation_prompt")
    for name, value in (("continue_final_message", said), ("add_generation_prompt", prompts)):
        if value is not None and not isinstance(value, bool):
            fields.refuse(name, "must be true or false")
    last = messages[-1]
    can = last["role"] == "assistant" and not last.get("tool_calls") and bool(last["content"])
    if said:
        if not can:
            fields.refuse("continue_final_message", "needs a last message of the assistant with text")
        if prompts:
            fields.refuse("add_generation_prompt", "does not go with continue_final_message")
        return True
    return can and said is None and not prompts


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The conversation.

    Raises:
        ApiError: 400, naming the part.
    """
    value = fields.take("messages")
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        fields.refuse("messages", f"must be a list of 1 to {MAX_MESSAGES} messages")
    return [_message(each, f"messages[{index}]") for index, each in enumerate(value)]


def _message(value: object, where: str) -> dict[str, Any]:
    fields = Fields(value, where)
    role = fields.take("role")
    if not isinstance(role, str) or role not in ROLES:
        fields.refuse("role", "must be system, developer, user, assistant or tool")
    content = fields.take("content")
    message: dict[str, Any] = {"role": ROLES[role]}
    calls = fields.take("tool_calls") if role == "assistant" else None
    fields.nothing("tool_calls", "belongs to messages of the assistant", [])
    fields.nothing("function_call", "is not supported: send tool_calls")
    fields.nothing("audio", "is not supported: models here neither see nor hear")
    if role == "tool":
        message["tool_call_id"] = fields.text("tool_call_id")
        name = fields.take("name")
        if isinstance(name, str):
            message["name"] = name
    thoughts = [fields.take(name) for name in ("reasoning_content", "reasoning")]
    if role == "assistant":
        content = "" if content is None else content
        said = next((each for each in thoughts if isinstance(each, str) and each), None)
        if said is not None:
            message["reasoning_content"] = fields.proper("reasoning_content", said)
        if calls:
            message["tool_calls"] = read_calls(fields, calls, where)
    fields.ignore(("name", "refusal", "annotations", "cache_control", "id"))
    fields.finish()
    return message | {"content": read_content(fields, content, where)}


def read_calls(fields: Fields, value: object, where: str) -> list[dict[str, Any]]:
    """Calls in the history, with arguments as objects, which is what templates expect."""
    if not isinstance(value, list) or len(value) > MAX_MESSAGES:
        fields.refuse("tool_calls", "must be a list of calls")
    calls = []
    for index, each in enumerate(value):
        call = Fields(each, f"{where}.tool_calls[{index}]")
        kind, number = call.take("type"), call.text("id")
        if kind not in (None, "function"):
            call.refuse("type", "must be function")
        function = Fields(call.take("function"), f"{where}.tool_calls[{index}].function")
        name = function.text("name")
        arguments = call_arguments(function)
        function.finish()
        call.ignore(("index",))
        call.finish()
        calls.append({"id": number, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def call_arguments(function: Fields) -> object:
    """Of a call in the history. A model may have written what is no JSON: its words are kept then."""
    value = function.take("arguments")
    if isinstance(value, dict):
        return value
    if value is not None and not isinstance(value, str):
        function.refuse("arguments", "must be a string of JSON")
    text = function.proper("arguments", value or "{}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def read_content(fields: Fields, content: object, where: str) -> str:
    """A text, or the texts of its parts."""
    if isinstance(content, str):
        return fields.proper("content", content)
    if not isinstance(content, list) or len(content) > MAX_MESSAGES:
        fields.refuse("content", "must be a string, or a list of parts")
    parts = []
    for index, each in enumerate(content):
        part = Fields(each, f"{where}.content[{index}]")
        kind = part.take("type")
        if kind not in ("text", "refusal"):
            part.refuse("type", "must be text: models here neither see nor hear", code="unsupported_parameter")
        parts.append(part.text(str(kind)))
        part.ignore(("cache_control",))
        part.finish()
    return "\n".join(parts)
