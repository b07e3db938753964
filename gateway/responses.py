"""What was generated -> OpenAI's objects, whole and in chunks. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from petals.peer.client.generation.generation import Token, TokenStream
from petals.peer.client.generation.sampling import Chance, Chances
from petals.peer.client.generation.text import NOT_WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every object of one answer begins with."""

    id: str
    created: int
    """Unix seconds."""
    model: str
    fingerprint: str
    chat: bool
    n: int = 1

    def whole(
        self, streams: Sequence[TokenStream], chances: Sequence[Sequence[Chances]], echoed: Sequence[str]
    ) -> dict[str, Any]:
        """The answer in one piece; `echoed`: what each choice begins with."""
        choices = [self._choice(i, *each) for i, each in enumerate(zip(streams, chances, echoed, strict=True))]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage(streams)}

    def _choice(self, index: int, stream: TokenStream, chances: Sequence[Chances], echoed: str) -> dict[str, Any]:
        said: dict[str, Any] = {"text": echoed + stream.text}
        if self.chat:
            said = {"message": {"role": "assistant", "content": stream.text, "refusal": None}}
        return {
            "index": index,
            **said,
            "logprobs": self._logprobs(chances, 0),
            "finish_reason": stream.finish_reason,
        }

    def opening(self, index: int, echoed: str) -> dict[str, Any]:
        """The first chunk: of a chat, who speaks; of a text, what it begins with."""
        said = {"delta": {"role": "assistant", "content": ""}} if self.chat else {"text": echoed}
        return self._chunk(index, said, None, None)

    def piece(self, index: int, token: Token, position: int) -> dict[str, Any]:
        """One token; `position` is how many characters came before it."""
        said = {"delta": {"content": token.text}} if self.chat else {"text": token.text}
        chances = () if token.chances is None else (token.chances,)
        return self._chunk(index, said, self._logprobs(chances, position), None)

    def closing(self, index: int, stream: TokenStream) -> dict[str, Any]:
        """The last chunk of a choice says why it ended."""
        return self._chunk(index, {"delta": {}} if self.chat else {"text": ""}, None, stream.finish_reason)

    def extra(self, **fields: Any) -> dict[str, Any]:
        """A chunk without a choice: usage, or the route."""
        return {**self._head(self._chunk_kind), "choices": [], **fields}

    def usage(self, streams: Sequence[TokenStream]) -> dict[str, Any]:
        """A prompt counts once, however many answers it gets; so does what servers had kept of it."""
        prompt = sum(len(stream.prompt_ids) for stream in streams[:: self.n])
        answer = sum(len(stream.token_ids) for stream in streams)
        kept = sum(
            min(stream.reused_tokens for stream in streams[first : first + self.n])
            for first in range(0, len(streams), self.n)
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": kept},
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, index: int, said: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head(self._chunk_kind), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _logprobs(self, chances: Sequence[Chances], position: int) -> dict[str, Any] | None:
        if not chances:
            return None
        if self.chat:
            tokens = [{**_chance(each.chosen), "top_logprobs": list(map(_chance, each.top))} for each in chances]
            return {"content": tokens, "refusal": None}
        offsets = []
        for each in chances:
            offsets.append(position)
            position += len(each.chosen.text)
        return {
            "tokens": [each.chosen.text for each in chances],
            "token_logprobs": [each.chosen.logprob for each in chances],
            "top_logprobs": [{one.text: one.logprob for one in each.top} for each in chances],
            "text_offset": offsets,
        }


def _chance(chance: Chance) -> dict[str, Any]:
    whole = NOT_WHOLE not in chance.text
    return {
        "token": chance.text,
        "logprob": chance.logprob,
        "bytes": list(chance.text.encode()) if whole else None,  # a part of a character has no text to tell them from
    }


def route_of(stream: TokenStream) -> dict[str, Any]:
    """Ours: which servers compute, what they took for the last token, and how fast it goes."""
    return {
        "route": [hop.as_json() for hop in stream.route],
        "tokens_per_s": stream.tokens_per_s,
        "first_token_s": stream.seconds.first_token,
        "tokens": len(stream.token_ids),
    }
