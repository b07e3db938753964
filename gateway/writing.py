"""Between generations and what a client reads: one choice as it grows, and the face of whoever writes it down."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from petals.gateway.errors import ApiError
from petals.gateway.output import Parser, Piece, PlainParser, Thought, Words
from petals.gateway.tools import ToolCall
from petals.peer.client.generation.generation import Token, TokenStream
from petals.peer.client.generation.sampling import Chances

EVENTS = "text/event-stream; charset=utf-8"
LINES = "application/x-ndjson"


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What is known of an answer before its first word."""

    id: str
    """Random; the API's own prefix goes in front."""
    created: int
    """Unix seconds."""
    model: str
    fingerprint: str
    n: int = 1


@dataclass(eq=False, slots=True)
class Choice:
    """One answer: what has been generated, and what it means."""

    index: int
    stream: TokenStream | None
    """None: only its prompt is wanted."""
    prompt_tokens: int
    parser: Parser = field(default_factory=PlainParser)
    echoed: str = ""
    """What it begins with."""
    echoed_tokens: Sequence[tuple[str, Chances | None]] = ()
    """The prompt's tokens with what the model thought of each; the first has nothing before it."""
    parts: list[Piece] = field(default_factory=list)
    """Thoughts, words and calls in their order, each as long as it goes."""
    chances: list[Chances] = field(default_factory=list)
    thought_tokens: int = 0
    """Of those generated."""

    def add(self, token: Token) -> list[Piece]:
        """What a token completes."""
        if token.chances is not None:
            self.chances.append(token.chances)
        pieces = self.parser.add(token.text)
        self.thought_tokens += any(isinstance(each, Thought) for each in pieces)
        return self._keep(pieces)

    def end(self) -> list[Piece]:
        """What was held back."""
        return self._keep(self.parser.end())

    def _keep(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            last = self.parts[-1] if self.parts else None
            if isinstance(piece, ToolCall) or type(last) is not type(piece):
                self.parts.append(piece)
            elif isinstance(last, Words | Thought):
                self.parts[-1] = type(last)(last.text + piece.text)
        return pieces

    @property
    def content(self) -> str:
        """All words."""
        return "".join(each.text for each in self.parts if isinstance(each, Words))

    @property
    def thoughts(self) -> str:
        """All thoughts."""
        return "".join(each.text for each in self.parts if isinstance(each, Thought))

    @property
    def calls(self) -> list[ToolCall]:
        """All calls."""
        return [each for each in self.parts if isinstance(each, ToolCall)]

    @property
    def finish_reason(self) -> str:
        """stop, length or tool_calls."""
        if self.stream is None:
            return "length"
        if self.calls and self.stream.finish_reason == "stop":
            return "tool_calls"
        return self.stream.finish_reason or "length"

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it."""
        return None if self.stream is None else self.stream.stopped_by

    @property
    def new_tokens(self) -> int:
        return 0 if self.stream is None else len(self.stream.token_ids)

    @property
    def reused_tokens(self) -> int:
        """Of the prompt; servers had kept them."""
        return 0 if self.stream is None else self.stream.reused_tokens


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request. A prompt counts once, however many answers it gets; so does what servers had kept of it."""

    prompt: int
    new: int
    kept: int

    @classmethod
    def of(cls, choices: Sequence[Choice], n: int) -> Usage:
        """`n`: answers to each prompt, which stand side by side."""
        groups = [choices[first : first + n] for first in range(0, len(choices), n)]
        return cls(
            sum(group[0].prompt_tokens for group in groups),
            sum(choice.new_tokens for choice in choices),
            sum(min(choice.reused_tokens for choice in group) for group in groups),
        )


class Writer(Protocol):
    """Writes one answer in the words of one API, whole or in pieces; made for each answer."""

    content_type: str
    """Of a stream."""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Everything at once."""

    def begin(self) -> Iterable[bytes]:
        """Before anything is known of any choice."""

    def opening(self, choice: Choice) -> Iterable[bytes]:
        """A choice has begun."""

    def step(self, choice: Choice, pieces: Sequence[Piece], chances: Chances | None) -> Iterable[bytes]:
        """A token has come, and completed pieces, or none."""

    def closing(self, choice: Choice) -> Iterable[bytes]:
        """A choice has ended."""

    def end(self, choices: Sequence[Choice]) -> Iterable[bytes]:
        """All have."""

    def route(self, stream: TokenStream) -> Iterable[bytes]:
        """The servers that compute, first or changed."""

    def failed(self, error: ApiError) -> Iterable[bytes]:
        """It could not go on."""


def event(data: object, name: str | None = None) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else compact(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def line(data: object) -> bytes:
    """A line of JSON."""
    return f"{compact(data)}\n".encode()


def compact(data: object) -> str:
    return json.dumps(data, separators=(",", ":"))


def route_of(stream: TokenStream) -> dict[str, Any]:
    """Ours: which servers compute, what they took for the last token, and how fast it goes."""
    return {
        "route": [hop.as_json() for hop in stream.route],
        "tokens_per_s": stream.tokens_per_s,
        "first_token_s": stream.seconds.first_token,
        "tokens": len(stream.token_ids),
    }
