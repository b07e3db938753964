"""What a chat in the terminal knows without asking anybody: its words, and how typed lines become messages."""

from __future__ import annotations

import sys
import unicodedata
from dataclasses import dataclass, field

BLOCK = '"""'
MAX_MESSAGE_CHARS = 1 << 20
"""A message grows no longer than this while it is typed (or pasted)."""

Message = dict[str, str]
"""`role` (system, user, assistant) and `content`, as chat templates take them."""


@dataclass
class Conversation:
    """The messages so far; a system message stays in front whatever happens to the rest."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def ask(self, question: str) -> None:
        self.turns.append({"role": "user", "content": question})

    def answered(self, text: str) -> None:
        """Note what came back. A question that got nothing is taken back: templates want the roles to alternate."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns.pop()

    def reset(self) -> None:
        self.turns.clear()

    def forget(self) -> bool:
        """Forget the oldest question and its answer; False: there is only the last question, which stays."""
        if len(self.turns) <= 2:
            return False
        del self.turns[:2]
        return True


class Composer:
    """Typed lines -> messages. A line that ends in a backslash goes on; a line of three quotes begins and ends a
    longer piece, in which nothing else has a meaning."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._quoted = False
        self._goes_on = False

    @property
    def waiting(self) -> bool:
        """Whether the message goes on with the next line."""
        return self._quoted or self._goes_on

    def add(self, line: str) -> str | None:
        """The message, when this line completes one."""
        self._goes_on = False
        if line.strip() == BLOCK:
            self._quoted = not self._quoted
        elif not self._quoted and line.endswith("\\"):
            self._goes_on = True
            self._lines.append(line[:-1])
        else:
            self._lines.append(line)
        if sum(map(len, self._lines)) > MAX_MESSAGE_CHARS:
            self.clear()
        if self.waiting:
            return None
        message = "\n".join(self._lines).strip()
        self.clear()
        return message

    def clear(self) -> None:
        """Forget what has been typed."""
        self._lines, self._quoted, self._goes_on = [], False, False


def on_terminal(text: str) -> str:
    """`printable` where a terminal shows it; a file or a program gets what was generated."""
    return printable(text) if sys.stdout.isatty() else text


def printable(text: str) -> str:
    """Model output without what a terminal would obey: strangers computed it, and may have put in escape codes."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")
