"""What was generated -> OpenAI's chats and completions, whole and in chunks. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from petals.gateway.errors import ApiError
from petals.gateway.output import Piece, Thought, Words
from petals.gateway.request_parser import Wanted
from petals.gateway.tools import ToolCall
from petals.gateway.writing import EVENTS, Choice, Head, Usage, event, route_of
from petals.peer.client.generation.generation import TokenStream
from petals.peer.client.generation.sampling import Chance, Chances
from petals.peer.client.generation.text import NOT_WHOLE


class OpenAiWriter:
    """What both have in common."""

    content_type = EVENTS
    kind = ""
    chunk_kind = ""
    id_prefix = ""

    def __init__(self, head: Head, wanted: Wanted) -> None:
        self._head = head
        self._wanted = wanted

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        listed = [
            {
                "index": choice.index,
                **self._said(choice),
                "logprobs": self._all_logprobs(choice),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return {**self._top(self.kind), "choices": listed, "usage": self._usage(choices)}

    def begin(self) -> Iterable[bytes]:
        return ()

    def end(self, choices: Sequence[Choice]) -> Iterable[bytes]:
        if self._wanted.include_usage:
            yield event({**self._top(self.chunk_kind), "choices": [], "usage": self._usage(choices)})
        yield event("[DONE]")

    def route(self, stream: TokenStream) -> Iterable[bytes]:
        yield event({**self._top(self.chunk_kind), "choices": [], "petals": route_of(stream), **self._no_usage()})

    def failed(self, error: ApiError) -> Iterable[bytes]:
        yield event(error.body())

    def closing(self, choice: Choice) -> Iterable[bytes]:
        yield self._chunk(choice, self._nothing(), reason=choice.finish_reason)

    def _said(self, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _nothing(self) -> dict[str, Any]:
        raise NotImplementedError

    def _all_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        raise NotImplementedError

    def _chunk(self, choice: Choice, said: dict[str, Any], *, logprobs: Any = None, reason: str | None = None) -> bytes:
        listed = {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": reason}
        usage: dict[str, Any] = {**self._no_usage()}
        if self._wanted.running_usage:
            usage = {"usage": self._usage([choice], n=1)}
        return event({**self._top(self.chunk_kind), "choices": [listed], **usage})

    def _no_usage(self) -> dict[str, None]:
        return {"usage": None} if self._wanted.include_usage else {}

    def _usage(self, choices: Sequence[Choice], n: int | None = None) -> dict[str, Any]:
        usage = Usage.of(choices, n or self._head.n)
        return {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.new,
            "total_tokens": usage.prompt + usage.new,
            "prompt_tokens_details": {"cached_tokens": usage.kept},
            "completion_tokens_details": {"reasoning_tokens": sum(choice.thought_tokens for choice in choices)},
        }

    def _top(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id_prefix + self._head.id,
            "object": kind,
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.fingerprint,
        }


class ChatWriter(OpenAiWriter):
    """/v1/chat/completions."""

    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def opening(self, choice: Choice) -> Iterable[bytes]:
        yield self._chunk(choice, {"delta": {"role": "assistant", "content": ""}})

    def step(self, choice: Choice, pieces: Sequence[Piece], chances: Chances | None) -> Iterable[bytes]:
        logprobs = None if chances is None else {"content": [_token(chances)], "refusal": None}
        if not pieces and logprobs is not None:
            yield self._chunk(choice, {"delta": {"content": ""}}, logprobs=logprobs)
        for piece in pieces:
            yield self._chunk(choice, {"delta": self._delta(choice, piece)}, logprobs=logprobs)
            logprobs = None

    def _delta(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        match piece:
            case Words(text):
                return {"content": text}
            case Thought(text):
                return {"reasoning_content": text}
            case ToolCall():
                return {"tool_calls": [{"index": choice.calls.index(piece), **_call(piece)}]}

    def _said(self, choice: Choice) -> dict[str, Any]:
        calls = [_call(each) for each in choice.calls]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": choice.content or (None if calls else ""),
            "refusal": None,
        }
        if choice.thoughts:
            message["reasoning_content"] = choice.thoughts
        if calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _nothing(self) -> dict[str, Any]:
        return {"delta": {}}

    def _all_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if self._wanted.options.logprobs is None:
            return None
        return {"content": [_token(each) for each in choice.chances], "refusal": None}


class TextWriter(OpenAiWriter):
    """/v1/completions."""

    kind, chunk_kind, id_prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, head: Head, wanted: Wanted) -> None:
        super().__init__(head, wanted)
        self._written: dict[int, int] = {}
        """Characters of each choice so far."""

    def opening(self, choice: Choice) -> Iterable[bytes]:
        if choice.echoed or choice.echoed_tokens:
            logprobs = _text_logprobs(choice.echoed_tokens, 0) if choice.echoed_tokens else None
            self._written[choice.index] = len(choice.echoed)
            yield self._chunk(choice, {"text": choice.echoed}, logprobs=logprobs)

    def step(self, choice: Choice, pieces: Sequence[Piece], chances: Chances | None) -> Iterable[bytes]:
        text = "".join(piece.text for piece in pieces if isinstance(piece, Words))
        if text or chances is not None:
            at = self._written.get(choice.index, 0)
            self._written[choice.index] = at + len(text)
            logprobs = None if chances is None else _text_logprobs([(chances.chosen.text, chances)], at)
            yield self._chunk(choice, {"text": text}, logprobs=logprobs)

    def _said(self, choice: Choice) -> dict[str, Any]:
        return {"text": choice.echoed + choice.content}

    def _nothing(self) -> dict[str, Any]:
        return {"text": ""}

    def _all_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        every = [*choice.echoed_tokens, *((each.chosen.text, each) for each in choice.chances)]
        return _text_logprobs(every, 0) if every else None


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _token(chances: Chances) -> dict[str, Any]:
    return {**_chance(chances.chosen), "top_logprobs": list(map(_chance, chances.top))}


def _chance(chance: Chance) -> dict[str, Any]:
    whole = NOT_WHOLE not in chance.text
    return {
        "token": chance.text,
        "logprob": chance.logprob,
        "bytes": list(chance.text.encode()) if whole else None,  # a part of a character has no text to tell them from
    }


def _text_logprobs(tokens: Sequence[tuple[str, Chances | None]], position: int) -> dict[str, Any]:
    """Of tokens that begin at a character. The first token of a prompt has no probability: nothing comes before."""
    offsets = []
    for text, _ in tokens:
        offsets.append(position)
        position += len(text)
    return {
        "tokens": [text for text, _ in tokens],
        "token_logprobs": [None if each is None else each.chosen.logprob for _, each in tokens],
        "top_logprobs": [None if each is None else _top(each) for _, each in tokens],
        "text_offset": offsets,
    }


def _top(chances: Chances) -> dict[str, float]:
    """The likeliest tokens, and the chosen one, whether it is among them or not."""
    found = {one.text: one.logprob for one in chances.top}
    return found if chances.chosen.text in found else found | {chances.chosen.text: chances.chosen.logprob}
