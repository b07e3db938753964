"""From tokens to text: whole characters only, and nothing of a stop string, however tokens cut it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

NOT_WHOLE = "\ufffd"
"""What the tokenizer shows for bytes that are no whole character yet."""


class Decoder:
    """Text of a growing list of tokens; holds back what is not yet a whole character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, special: bool = False) -> None:
        """
        Args:
            special: spell special tokens out.
        """
        self._tokenizer = tokenizer
        self._special = special
        self._ids: list[int] = []
        self._emitted = ""

    def add(self, token: int, *, last: bool = False, silent: bool = False) -> str:
        """The text that `token` completes; with the last one whatever is left.

        Args:
            silent: the token itself has no text, if it is a special one.
        """
        if not (silent and self._special):
            self._ids.append(token)
        text = self._decoded(self._ids)
        if text.endswith(NOT_WHOLE) and not last:
            return ""
        fresh, self._emitted = text[len(self._emitted) :], text
        if text.endswith("\n"):  # a safe place to forget the past: decoding is quadratic otherwise
            self._ids, self._emitted = [token], self._decoded([token])
        return fresh

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=not self._special))


class StopStrings:
    """Cuts a stream of text before the first of some strings; holds back what may be the beginning of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False
        self.which: str | None = None
        """The string that was found."""

    def add(self, text: str, *, last: bool = False) -> str:
        """What can be said now. Once a string was `found` nothing more is."""
        if self.found:
            return ""
        text = self._held + text
        self._held = ""
        ends = [(at, each) for each in self._strings if (at := text.find(each)) >= 0]
        if ends:
            self.found = True
            at, self.which = min(ends)
            return text[:at]
        held = 0 if last else max((overlap(text, each) for each in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def overlap(text: str, string: str) -> int:
    """How many characters at the end of `text` begin `string`."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
