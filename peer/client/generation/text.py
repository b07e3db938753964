"""From tokens to text: whole characters only, and nothing of a stop string, however tokens cut it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

NOT_WHOLE = "\ufffd"
"""What the tokenizer shows for bytes that are no whole character yet."""


class Decoder:
    """Text of a growing list of tokens; holds back what is not yet a whole character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._emitted = ""

    def add(self, token: int, *, last: bool = False) -> str:
        """The text that `token` completes; with the last one whatever is left."""
        self._ids.append(token)
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if text.endswith(NOT_WHOLE) and not last:
            return ""
        fresh, self._emitted = text[len(self._emitted) :], text
        if text.endswith("\n"):  # a safe place to forget the past: decoding is quadratic otherwise
            self._ids, self._emitted = [token], str(self._tokenizer.decode([token], skip_special_tokens=True))
        return fresh


class StopStrings:
    """Cuts a stream of text before the first of some strings; holds back what may be the beginning of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def add(self, text: str, *, last: bool = False) -> str:
        """What can be said now. Once a string was `found` nothing more is."""
        if self.found:
            return ""
        text = self._held + text
        self._held = ""
        ends = [at for each in self._strings if (at := text.find(each)) >= 0]
        if ends:
            self.found = True
            return text[: min(ends)]
        held = 0 if last else max((overlap(text, each) for each in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def overlap(text: str, string: str) -> int:
    """How many characters at the end of `text` begin `string`."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
