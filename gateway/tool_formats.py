"""How families of models write tool calls: text -> calls, and the grammar of what must be calls. Pure.

A format knows the marker that opens calls, the one that closes them, and what stands between. Names are checked by
whoever parses: a call of a tool that was not offered is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from petals.gateway.tools import Tool
from petals.peer.client.constraints import Constraint

Calls = list[tuple[str, Any]]
"""Name and arguments of each call."""

Payload = Literal["call", "arguments", "xml"]
"""What a call is between its head and its tail: an object with name and arguments, the arguments alone, or XML."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One way to write calls: `prefix`, then calls parted by `between`, then `suffix`."""

    name: str
    opens: str = ""
    """The marker that no other text has; empty: an answer that begins with JSON is calls."""
    closes: str = ""
    """The marker behind calls; empty: they go on to the end of the answer."""
    read: Callable[[str], Calls]
    """What stands between the markers.

    Raises:
        ValueError: these are no calls.
    """
    prefix: str = ""
    head: str = ""
    """In front of a call; NAME stands for the tool's."""
    tail: str = ""
    between: str = "\n"
    suffix: str = ""
    thoughts: tuple[str, str] = ("", "")
    """What thoughts in front of calls stand between."""
    payload: Payload = "call"
    argument_key: str = "arguments"

    @property
    def marks(self) -> bool:
        """Whether calls in free text are known by where they begin."""
        return bool(self.opens) and not all(self.thoughts)

    def constraint(self, tools: Sequence[Tool], *, parallel: bool, free: bool = False) -> Constraint | None:
        """The answer is calls of these tools, with arguments as their schemas say.

        Args:
            free: text may stand before and behind, and no call is needed, but those that are made are right; None where
                the format has no marker by which the beginning of a call is known.
        """
        if free and not self.marks:
            return None
        rules, literals = [r"text: /(.|\n)*/"], []
        for index, tool in enumerate(tools):
            head = self.head.replace("NAME", tool.name)
            literals.append((f"head_{index}", head))
            literals.append((f"first_{index}", (self.prefix + head).removeprefix(self.opens if free else "")))
            rules += _payload_rules(self, index, tool)
        literals += [("tail", self.tail), ("suffix", self.suffix), ("between", self.between)]
        literals += [("think", self.thoughts[0]), ("thought", self.thoughts[1])]
        empty = {name for name, text in literals if not text}
        empty |= {f"payload_{i}" for i, tool in enumerate(tools) if not _has_payload(self, tool)}

        def sequence(*names: str) -> str:
            return " ".join(name for name in names if name not in empty)

        calls = range(len(tools))
        rules.append("first: " + " | ".join(sequence(f"first_{i}", f"payload_{i}", "tail") for i in calls))
        rules.append("another: " + " | ".join(sequence("between", f"head_{i}", f"payload_{i}", "tail") for i in calls))
        answer = sequence("first", "another*" if parallel else "", "suffix")
        if free:
            rules.append(f"start: (until_opens {answer})? text")
        else:
            rules.append(f"start: (think text thought)? {answer}" if all(self.thoughts) else f"start: {answer}")
        if free:
            literals.append(("until_opens", self.opens))
        return Constraint("grammar", "\n".join(rules), tuple(each for each in literals if each[1]))


def _has_payload(form: ToolFormat, tool: Tool) -> bool:
    return form.payload != "xml" or bool(tool.parameters.get("properties"))


def _payload_rules(form: ToolFormat, index: int, tool: Tool) -> list[str]:
    """Lark rules payload_INDEX and what it needs."""
    if form.payload == "arguments":
        return [f"payload_{index}: %json {json.dumps(tool.parameters)}"]
    if form.payload == "call":
        arguments: dict[str, Any] = {key: value for key, value in tool.parameters.items() if key not in _DEFINITIONS}
        properties = {"name": {"const": tool.name}, form.argument_key: arguments}
        definitions = {key: tool.parameters[key] for key in _DEFINITIONS if key in tool.parameters}
        call = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        return [f"payload_{index}: %json {json.dumps(call | definitions)}"]
    rules, names = [], []
    required = tool.parameters.get("required", ())
    for number, (name, schema) in enumerate(tool.parameters.get("properties", {}).items()):
        rule = f"parameter_{index}_{number}"
        kind = schema.get("type") if isinstance(schema, dict) else None
        opening = json.dumps(f"<parameter={name}>\n")
        if kind == "string" and "enum" not in schema:
            rules += [f"{rule}: {opening} {rule}_text", rf"{rule}_text[lazy]: /(.|\n)*\n<\/parameter>\n/"]
        else:
            definitions = {key: tool.parameters[key] for key in _DEFINITIONS if key in tool.parameters}
            schema = definitions | schema if isinstance(schema, dict) else schema
            rules.append(f'{rule}: {opening} %json {json.dumps(schema)} "\\n</parameter>\\n"')
        names.append(rule if name in required else f"{rule}?")
    return [f"payload_{index}: {' '.join(names)}", *rules] if names else []


_DEFINITIONS = ("$defs", "definitions")
"""What references inside a schema point at, from its root."""


def _object(value: Any) -> tuple[str, Any]:
    """A call as most families write it."""
    if not isinstance(value, dict):
        raise ValueError("a call is an object")
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name")
    arguments: Any = next((value[key] for key in ("arguments", "parameters", "args") if key in value), {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("a call has a name and arguments")
    return name, arguments


def _values(text: str) -> Iterator[Any]:
    """JSON values one after another, parted by blanks, commas or semicolons."""
    decoder, at = json.JSONDecoder(), 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,;":
            at += 1
        if at >= len(text):
            return
        value, at = decoder.raw_decode(text, at)
        yield value


def read_json_calls(text: str) -> Calls:
    """One object, several, or a list; perhaps in a fence of Markdown."""
    text = re.sub(r"^\s*```(?:json)?\n|\n```\s*$", "", text)
    calls: Calls = []
    for value in _values(text):
        if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
            value = value["tool_calls"]
        calls.extend(map(_object, value if isinstance(value, list) else [value]))
    if not calls:
        raise ValueError("no calls")
    return calls


_XML_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|$)", re.DOTALL)
_XML_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|$)", re.DOTALL)


def read_hermes(text: str) -> Calls:
    """JSON between <tool_call> and </tool_call>, or the XML of Qwen3-Coder and Qwen3.5."""
    if "<function=" not in text:
        return read_json_calls(text)
    calls: Calls = []
    for name, body in _XML_FUNCTION.findall(text):
        calls.append((name, dict(_XML_PARAMETER.findall(body))))
    if not calls:
        raise ValueError("no calls")
    return calls


def unquoted(tool: Tool, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that were written without quotes, as the tool's schema types them."""
    properties = tool.parameters.get("properties", {})
    made = {}
    for name, value in arguments.items():
        schema = properties.get(name)
        made[name] = value
        if isinstance(value, str) and not (isinstance(schema, dict) and schema.get("type") == "string"):
            with suppress(ValueError):
                made[name] = json.loads(value)
    return made


def read_llama(text: str) -> Calls:
    """Llama 3: objects parted by semicolons."""
    return read_json_calls(text.replace("<|python_tag|>", ""))


def read_mistral(text: str) -> Calls:
    """[TOOL_CALLS] and a JSON list, or name[ARGS]{...} for each."""
    text = text.replace("[TOOL_CALLS]", "\n").strip()
    if text.startswith("["):
        return read_json_calls(text)
    calls: Calls = []
    decoder, at = json.JSONDecoder(), 0
    pattern = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*(?=\{)")
    while at < len(text):
        found = pattern.match(text, at)
        if found is None:
            raise ValueError("no call")
        arguments, at = decoder.raw_decode(text, found.end())
        calls.append((found[1], arguments))
        while at < len(text) and text[at].isspace():
            at += 1
    if not calls:
        raise ValueError("no calls")
    return calls


_DEEPSEEK = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?([\w.-]+)(?:<｜tool▁sep｜>|\n)\s*(?:```json\n)?(.*?)(?:\n```)?\s*<｜tool▁call▁end｜>",
    re.DOTALL,
)


def read_deepseek(text: str) -> Calls:
    """DeepSeek V3, R1 and V3.1."""
    calls: Calls = []
    for name, arguments in _DEEPSEEK.findall(text):
        found = json.loads(arguments)
        if not isinstance(found, dict):
            raise ValueError("arguments are an object")
        calls.append((name, found))
    if not calls:
        raise ValueError("no calls")
    return calls


HERMES = ToolFormat(
    name="hermes",
    opens="<tool_call>",
    closes="</tool_call>",
    read=read_hermes,
    head="<tool_call>\n",
    tail="\n</tool_call>",
)
QWEN_XML = replace(
    HERMES,
    name="qwen_xml",
    head="<tool_call>\n<function=NAME>\n",
    tail="</function>\n</tool_call>",
    payload="xml",
)
LLAMA = ToolFormat(name="llama", read=read_llama, between="; ", argument_key="parameters")
MISTRAL = ToolFormat(
    name="mistral", opens="[TOOL_CALLS]", read=read_mistral, prefix="[TOOL_CALLS][", between=", ", suffix="]"
)
MISTRAL_ARGS = ToolFormat(
    name="mistral_args",
    opens="[TOOL_CALLS]",
    read=read_mistral,
    head="[TOOL_CALLS]NAME[ARGS]",
    between="",
    payload="arguments",
)
DEEPSEEK = ToolFormat(
    name="deepseek",
    opens="<｜tool▁calls▁begin｜>",
    closes="<｜tool▁calls▁end｜>",
    read=read_deepseek,
    prefix="<｜tool▁calls▁begin｜>",
    head="<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
    tail="\n```<｜tool▁call▁end｜>",
    suffix="<｜tool▁calls▁end｜>",
    payload="arguments",
)
DEEPSEEK_31 = replace(
    DEEPSEEK,
    name="deepseek_31",
    head="<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
    tail="<｜tool▁call▁end｜>",
    between="",
)
HARMONY = ToolFormat(
    name="harmony",
    opens="<|channel|>commentary to=",
    read=read_json_calls,  # output.py reads harmony's channels
    thoughts=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    head="<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",
    payload="arguments",
)
GENERIC = ToolFormat(name="json", read=read_json_calls)


def format_of(template: str) -> ToolFormat:
    """The format that a chat template teaches its model."""
    if "<|channel|>" in template:
        return HARMONY
    if "<tool_call>" in template:
        return QWEN_XML if "<function=" in template else HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if "<｜tool▁calls▁begin｜>" in template:
        return DEEPSEEK if "```json" in template else DEEPSEEK_31
    if "<|python_tag|>" in template or ("ipython" in template and '"parameters"' in template):
        return LLAMA
    return GENERIC
