"""Drafts from the text itself: more than one token per round trip, and the very same tokens.

Theory. What comes next often stands in the text already: code repeats names, answers quote their question. The last few
tokens are looked up in the text; what followed them there is the draft (prompt lookup decoding, A. Saxena, 2023). One
step computes the logits after every drafted token, and a drafted token stays only if it is the one that would have been
chosen, by greedy choice or by the next draw of the same generator. So drafts change how many steps an answer takes and
nothing else.

A step of several tokens takes longer than one of one token, most of all where the processor is the bottleneck, least
where the network is. How long a draft may be is therefore decided by measurement: the length with the most tokens
expected per second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

LONGEST_MATCH, SHORTEST_MATCH = 4, 2
"""Tokens at the end of the text that are looked up; longer matches are tried first, they are right more often."""
LONGEST_DRAFT = 16
MEMORY = 0.8
"""Share that an average keeps of what it knew, with each new measurement."""
PAYS = 1.05
"""A draft must promise this many times the tokens per second of a plain step: guesses are never sure."""
WORTH_S = 0.01
"""Plain steps quicker than this are left alone: there is no network to hide."""
PRIOR, FORGIVEN = 0.5, 0.05
FIRST_MORE = 0.03
"""Share of a plain step that a drafted token is taken to add, before it was measured."""
_MATCHES = range(SHORTEST_MATCH, LONGEST_MATCH + 1)
FIRST_PLAIN = 3
"""Plain steps before the first draft, to know how long one takes; the first one opens caches."""


DraftMode = Literal["auto", "always", "never"]


class NgramIndex:
    """Where the token sequences of a growing text stand; answers in constant time."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the end of the text."""
        for token in tokens:
            end = len(self._text)
            for length in _MATCHES:
                if end >= length:  # what ends just before `token` is followed by it
                    self._after[tuple(self._text[end - length :])] = end
            self._text.append(token)

    def __len__(self) -> int:
        return len(self._text)

    def match(self) -> tuple[int, int]:
        """How many tokens at the end of the text stood there before, at most `LONGEST_MATCH`, and where the latest such
        place ends; (0, 0) if fewer than `SHORTEST_MATCH` did."""
        for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
            place = self._after.get(tuple(self._text[-length:])) if len(self._text) >= length else None
            if place is not None:
                return length, place
        return 0, 0

    def repeat(self, place: int, count: int) -> list[int]:
        """`count` tokens from `place` on; what reaches the end of the text goes on with itself, as a period does."""
        draft: list[int] = []
        for offset in range(count):
            at = place + offset
            draft.append(self._text[at] if at < len(self._text) else draft[at - len(self._text)])
        return draft


@dataclass(slots=True)
class DraftPolicy:
    """How long the next draft may be, from what the last ones brought. Pure: times are passed in."""

    mode: DraftMode = "auto"
    """"auto": where measured steps say that it pays; "always": as soon as there is a match; "never"."""
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    _first: dict[int, float] = field(default_factory=lambda: dict.fromkeys(_MATCHES, PRIOR))
    """The chance that the first token of a draft is right, by the length of the match."""
    _next: float = 0.8
    """That a later one is, when those before it were: a text that is being repeated goes on being repeated."""
    _plain_s: float | None = None
    _more_s: float | None = None
    """Seconds that each token of a draft adds to a step."""
    _plain_seen: int = 0

    def length(self, match: int) -> int:
        """Tokens that the next draft may have, behind a match of so many; 0: none."""
        if self.mode != "auto":
            return LONGEST_DRAFT if self.mode == "always" else 0
        if self._plain_s is None or self._plain_seen < FIRST_PLAIN or self._plain_s < WORTH_S:
            return 0
        more = FIRST_MORE * self._plain_s if self._more_s is None else self._more_s
        expected, best, rate = 1.0, 0, PAYS / self._plain_s
        for length in range(1, LONGEST_DRAFT + 1):
            expected += self._first[match] * self._next ** (length - 1)
            if expected / (self._plain_s + more * length) > rate:
                best, rate = length, expected / (self._plain_s + more * length)
        return best

    def note(self, match: int, drafted: int, accepted: int, seconds: float) -> None:
        """A step took `seconds`; it had a draft of `drafted` tokens behind a match of `match`, of which `accepted` were
        right."""
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted
        if not drafted:
            self._plain_seen += 1
            if self._plain_seen > 1:  # the first step is a prompt
                self._plain_s = _mixed(self._plain_s, seconds)
            if match:  # what is not tried is slowly forgiven: the text may have turned to repeating itself
                self._first[match] += FORGIVEN * (PRIOR - self._first[match])
            return
        self._first[match] = _mixed(self._first[match], float(accepted > 0))
        for right in ([1.0] * accepted + [0.0] * (accepted < drafted))[1:]:
            self._next = _mixed(self._next, right)
        if self._plain_s is not None:
            self._more_s = _mixed(self._more_s, max(0.0, seconds - self._plain_s) / drafted)


def _mixed(known: float | None, new: float) -> float:
    return new if known is None else MEMORY * known + (1 - MEMORY) * new


@dataclass(slots=True)
class TextDrafter:
    """Drafts for one text."""

    policy: DraftPolicy
    clock: Callable[[], float]
    index: NgramIndex = field(default_factory=NgramIndex)
    _match: int = 0

    @classmethod
    def without_drafts(cls) -> Self:
        """Proposes nothing."""
        return cls(DraftPolicy(mode="never"), lambda: 0.0)

    def propose(self, text: Sequence[int], room: int) -> list[int]:
        """A draft of at most `room` tokens after `text`, of which the drafter has seen a beginning."""
        if self.policy.mode == "never":
            return []
        self.index.extend(text[len(self.index) :])
        self._match, place = self.index.match()
        length = min(room, self.policy.length(self._match)) if self._match else 0
        return self.index.repeat(place, length)

    def note(self, drafted: int, accepted: int, seconds: float) -> None:
        """The step with the last draft took `seconds`, and `accepted` of its `drafted` tokens were right."""
        self.policy.note(self._match, drafted, accepted, seconds)
