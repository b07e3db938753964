"""Tools that a request offers to the model, and the calls that the model makes. Pure."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from petals.gateway.fields import Fields

MAX_TOOLS = 128
MAX_NAME = 64

Mode = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class Tool:
    """One function."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments, an object."""
    strict: bool = False

    def as_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools a request offers, and whether the model must call one."""

    tools: tuple[Tool, ...] = ()
    mode: Mode = "none"
    only: str | None = None
    """The tool that must be called."""
    parallel: bool = True
    """More than one call in an answer."""

    @property
    def offered(self) -> tuple[Tool, ...]:
        """What the model is shown."""
        return () if self.mode == "none" else self.tools

    @property
    def callable(self) -> tuple[Tool, ...]:
        """What it may call."""
        return tuple(each for each in self.offered if self.only in (None, each.name))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made."""

    name: str
    arguments: str
    """JSON of an object."""
    id: str = ""

    @classmethod
    def made(cls, name: str, arguments: object, ids: str = "call_") -> ToolCall:
        """With a fresh ID."""
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return cls(name, text, ids + secrets.token_hex(12))


def read_tools(fields: Fields, *, flat: bool = False) -> ToolUse:
    """`tools`, `tool_choice` and `parallel_tool_calls` as OpenAI spells them.

    Args:
        flat: the function's fields stand beside its type (/v1/responses), not under "function".
    Raises:
        ApiError: 400, naming the field.
    """
    value = fields.take("tools")
    tools: tuple[Tool, ...] = ()
    if value is not None:
        if not isinstance(value, list) or len(value) > MAX_TOOLS:
            fields.refuse("tools", f"must be a list of at most {MAX_TOOLS} tools")
        tools = tuple(_read_tool(each, f"tools[{index}]", flat=flat) for index, each in enumerate(value))
        check_names(fields, tools)
    mode, only = _read_choice(fields, tools, flat=flat)
    parallel = fields.take("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        fields.refuse("parallel_tool_calls", "must be true or false")
    return ToolUse(tools, mode, only, parallel is not False)


def check_names(fields: Fields, tools: tuple[Tool, ...]) -> None:
    """Raises ApiError: two tools have one name."""
    names = [each.name for each in tools]
    for name in names:
        if names.count(name) > 1:
            fields.refuse("tools", f"has two tools named {name}")


def read_schema(fields: Fields, name: str) -> Mapping[str, Any]:
    """A JSON schema of an object; what is missing takes no arguments.

    Raises:
        ApiError: it is none.
    """
    schema = fields.take(name)
    if schema is None:
        return {"type": "object", "properties": {}}
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        fields.refuse(name, 'must be a JSON schema with "type": "object"')
    return {"type": "object", **schema}


def read_name(fields: Fields, key: str = "name") -> str:
    """A tool's name.

    Raises:
        ApiError: it is none.
    """
    name = fields.text(key)
    if not 0 < len(name) <= MAX_NAME or not all(each.isascii() and (each.isalnum() or each in "_-.") for each in name):
        fields.refuse(key, f"must be 1 to {MAX_NAME} letters, digits, _, - or .")
    return name


def _read_tool(value: object, where: str, *, flat: bool) -> Tool:
    outer = Fields(value, where)
    kind = outer.take("type")
    if kind != "function":
        outer.refuse("type", "must be function: a peer has no tools of its own", code="unsupported_parameter")
    inner = outer if flat else Fields(outer.take("function"), f"{where}.function")
    name = read_name(inner)
    description = inner.take("description")
    if description is not None and not isinstance(description, str):
        inner.refuse("description", "must be a string")
    strict = inner.flag("strict")
    tool = Tool(name, inner.proper("description", description or ""), read_schema(inner, "parameters"), strict)
    inner.ignore(("defer_loading",))
    inner.finish()
    if not flat:
        outer.ignore(("cache_control",))
        outer.finish()
    return tool


def _read_choice(fields: Fields, tools: tuple[Tool, ...], *, flat: bool) -> tuple[Mode, str | None]:
    value = fields.take("tool_choice")
    if value is None:
        return ("auto" if tools else "none"), None
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            fields.refuse("tool_choice", "must be none, auto, required or a function")
        if value == "required" and not tools:
            fields.refuse("tool_choice", "is required, but there are no tools")
        mode: Mode = value if tools else "none"  # type: ignore[assignment]
        return mode, None
    about = Fields(value, "tool_choice")
    kind = about.take("type")
    if kind == "allowed_tools":
        about.refuse("type", "allowed_tools is not supported: leave the other tools out", code="unsupported_parameter")
    if kind != "function":
        about.refuse("type", "must be function")
    inner = about if flat else Fields(about.take("function"), "tool_choice.function")
    name = inner.text("name")
    if name not in [each.name for each in tools]:
        inner.refuse("name", "is not among the tools")
    return "required", name
