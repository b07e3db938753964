"""Generated text -> what it is: thoughts, words for the user, calls of tools. Text comes in any pieces. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from petals.gateway.tool_formats import ToolFormat, unquoted
from petals.gateway.tools import ToolCall, ToolUse
from petals.peer.client.generation.text import overlap

THINK, THOUGHT = "<think>", "</think>"
MAX_CALLS = 128
"""In one answer; more are text."""


@dataclass(frozen=True, slots=True)
class Words:
    """For the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """What the model says to itself first."""

    text: str


Piece = Words | Thought | ToolCall


class Parser(Protocol):
    """Of one answer."""

    @property
    def failed_calls(self) -> int:
        """What looked like calls, and was none."""

    def add(self, text: str) -> list[Piece]:
        """What `text` completes."""

    def end(self) -> list[Piece]:
        """What was held back; nothing comes after."""


class PlainParser:
    """Everything is words."""

    failed_calls = 0

    def add(self, text: str) -> list[Piece]:
        return [Words(text)] if text else []

    def end(self) -> list[Piece]:
        return []


class CallReader:
    """Text that calls are made of -> calls of tools that were offered."""

    def __init__(self, use: ToolUse) -> None:
        self._tools = {tool.name: tool for tool in use.callable}
        self._left = MAX_CALLS if use.parallel else 1
        self.failed = 0

    def read(self, form: ToolFormat, text: str) -> list[ToolCall] | None:
        """None: it is text. Of several calls where one was allowed, the first."""
        try:
            found = form.read(text)
            if form.payload == "xml" or "<function=" in text:
                found = [(name, unquoted(self._tools[name], arguments)) for name, arguments in found]
            return self.take(found)
        except (ValueError, KeyError, RecursionError):
            self.failed += 1
            return None

    def take(self, found: list[tuple[str, object]]) -> list[ToolCall]:
        """
        Raises:
            KeyError: a tool that was not offered.
        """
        calls = [ToolCall.made(self._tools[name].name, arguments) for name, arguments in found][: self._left]
        self._left -= len(calls)
        return calls


class MarkedParser:
    """Thoughts between <think> and </think>, calls between a format's markers, and words around them."""

    def __init__(self, use: ToolUse, form: ToolFormat, *, thinks: bool, thinking: bool) -> None:
        """
        Args:
            thinks: the model may begin with thoughts.
            thinking: the prompt has opened them.
        """
        self._calls = CallReader(use)
        self._form = form if use.callable else None
        self._text = ""
        self._state = "thinking" if thinking else "start" if thinks else "words"
        self._said = False
        self._trim = thinking
        self._blank = ""
        """Blanks in front of what may be a call."""

    @property
    def failed_calls(self) -> int:
        return self._calls.failed

    def add(self, text: str) -> list[Piece]:
        self._text += text
        return [piece for piece in self._pieces(last=False) if not isinstance(piece, Words | Thought) or piece.text]

    def end(self) -> list[Piece]:
        pieces = [piece for piece in self._pieces(last=True) if not isinstance(piece, Words | Thought) or piece.text]
        self._text = ""
        return pieces

    def _pieces(self, *, last: bool) -> Iterator[Piece]:
        before = None
        while before != (self._state, len(self._text)):
            before = (self._state, len(self._text))
            match self._state:
                case "start":
                    self._start(last=last)
                case "thinking":
                    yield from self._thinking(last=last)
                case "words":
                    yield from self._words(last=last)
                case "call":
                    yield from self._call(last=last)

    def _start(self, *, last: bool) -> None:
        stripped = self._text.lstrip()
        if stripped.startswith(THINK):
            self._text, self._state, self._trim = stripped[len(THINK) :], "thinking", True
        elif last or not THINK.startswith(stripped):
            self._state = "words"

    def _thinking(self, *, last: bool) -> Iterator[Piece]:
        text, self._text = self._text, ""
        if self._trim:
            text = text.lstrip()
        at = text.find(THOUGHT)
        if at >= 0:
            yield Thought(text[:at].rstrip())
            self._text, self._state, self._trim = text[at + len(THOUGHT) :], "words", True
            return
        self._trim = self._trim and not text
        kept = text if last else text[: len(text) - overlap(text, THOUGHT)].rstrip()
        self._text = text[len(kept) :]
        yield Thought(kept)

    def _words(self, *, last: bool) -> Iterator[Piece]:
        if self._trim:
            self._text = self._text.lstrip()
            self._trim = not self._text
        form = self._form
        if form is None:
            yield self._say(len(self._text))
        elif form.opens:
            at = self._text.find(form.opens)
            if at >= 0:
                yield self._say(len(self._text[:at].rstrip()))
                blanks = len(self._text) - len(self._text.lstrip())
                self._blank, self._state = self._text[:blanks], "call"
                self._text = self._text[blanks + len(form.opens) :]
            else:
                # Blanks wait, too: in front of a call they are nothing the user should see.
                held = 0 if last else overlap(self._text, form.opens)
                free = self._text[: len(self._text) - held]
                yield self._say(len(free) if last else len(free.rstrip()))
        else:
            yield from self._unmarked(last=last)

    def _unmarked(self, *, last: bool) -> Iterator[Piece]:
        """Calls without a marker are known by how the answer begins."""
        begins = ("{", "[", "```json", "<|python_tag|>")
        stripped = self._text.lstrip()
        if self._said or (stripped and not any(b.startswith(stripped) or stripped.startswith(b) for b in begins)):
            yield self._say(len(self._text))
        elif last or any(stripped.startswith(each) for each in begins):
            self._state = "call" if stripped else "words"
            if not stripped:
                yield self._say(len(self._text))

    def _call(self, *, last: bool) -> Iterator[Piece]:
        form = self._form
        assert form is not None
        at = self._text.find(form.closes) if form.closes else -1
        if at < 0 and not last:
            return
        body = self._text if at < 0 else self._text[:at]
        whole = form.opens + (self._text if at < 0 else self._text[: at + len(form.closes)])
        self._text = "" if at < 0 else self._text[at + len(form.closes) :]
        self._state, self._trim = "words", True
        calls = self._calls.read(form, body)
        if calls is None:
            self._trim, self._said = False, True
            yield Words(self._blank + whole)
        else:
            yield from calls

    def _say(self, length: int) -> Words:
        words, self._text = Words(self._text[:length]), self._text[length:]
        self._said = self._said or bool(words.text)
        return words


_TO = re.compile(r"to=(?:functions\.)?([\w.-]+)")
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")


class HarmonyParser:
    """gpt-oss: messages in channels; analysis is thoughts, commentary to a function is a call, the rest is words."""

    def __init__(self, use: ToolUse) -> None:
        self._calls = CallReader(use)
        self._text = ""
        self._header: str | None = None
        """Of the message that is being written; None: the header itself is."""

    @property
    def failed_calls(self) -> int:
        return self._calls.failed

    def add(self, text: str) -> list[Piece]:
        self._text += text
        return list(self._pieces(last=False))

    def end(self) -> list[Piece]:
        return list(self._pieces(last=True))

    def _pieces(self, *, last: bool) -> Iterator[Piece]:
        while True:
            if self._header is None:
                header, found, rest = self._text.partition("<|message|>")
                if not found:
                    if last and header and "<|" not in header:  # a model that does not keep to its format
                        yield Words(header)
                    return
                self._header, self._text = header, rest
            ends = [(at, each) for each in _ENDS if (at := self._text.find(each)) >= 0]
            if not ends:
                yield from self._partial(last=last)
                return
            at, end = min(ends)
            yield from self._message(self._text[:at])
            self._text, self._header = self._text[at + len(end) :], None

    def _partial(self, *, last: bool) -> Iterator[Piece]:
        assert self._header is not None
        if _TO.search(self._header) and not last:
            return
        held = 0 if last else max(overlap(self._text, each) for each in _ENDS)
        kept, self._text = self._text[: len(self._text) - held], self._text[len(self._text) - held :]
        yield from self._message(kept)

    def _message(self, body: str) -> Iterator[Piece]:
        assert self._header is not None
        to = _TO.search(self._header)
        if to is not None:
            yield from self._call(to[1], body)
        elif body:
            yield Thought(body) if "analysis" in self._header else Words(body)

    def _call(self, name: str, body: str) -> Iterator[Piece]:
        try:
            if not isinstance(json.loads(body), dict):
                raise ValueError("arguments are an object")
            yield from self._calls.take([(name, body.strip())])
        except (ValueError, KeyError, RecursionError):
            self._calls.failed += 1
            yield Words(body)
