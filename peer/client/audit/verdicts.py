"""What a client thinks of servers' answers: how often each is checked, what was found, and who has lied."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from petals.protocols.types import PeerId

DOUBLED_AT_MOST = 3
"""Suspicions and complaints double the rate of a peer's audits, each of them, up to eight times."""
MAX_FINDINGS = 1000


class Verdict(enum.Enum):
    LIED = enum.auto()
    """Others, or we ourselves, have come to another answer, and agree."""
    SUSPECT = enum.auto()
    """Two disagree, and nobody was there to decide."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one answer that was not what it should be."""

    peer_id: PeerId
    verdict: Verdict
    blocks: range
    position: int
    """Of the step's first token; earlier answers of this peer may have been wrong too."""
    error: float
    tolerance: float

    def describe(self) -> str:
        """For people, one line."""
        lied = self.verdict is Verdict.LIED
        said = "answered wrongly" if lied else "and another server disagree"
        then = "what came through it until now may be wrong" if lied else "one of them is wrong"
        return (
            f"…{self.peer_id[-6:]} {said} about blocks {self.blocks.start}:{self.blocks.stop} at position "
            f"{self.position} (error {self.error:.1e}, rounding is at most {self.tolerance:.1g}); {then}"
        )


@dataclass
class Trust:
    """Of one client in the servers of one model.

    Args:
        accusers: how many other peers complain about one (peer/membership/complaints.py).
    """

    accusers: Callable[[PeerId], int] = lambda _: 0
    audited: int = 0
    """Answers that were computed again."""
    unchecked: int = 0
    """Answers that were to be, but nobody could."""
    findings: list[Finding] = field(default_factory=list)
    """The latest thousand."""
    _suspicions: Counter[PeerId] = field(default_factory=Counter)

    def rate(self, base: float, peer_id: PeerId) -> float:
        """The probability with which an answer of this peer is audited."""
        doublings = min(DOUBLED_AT_MOST, self._suspicions[peer_id] + self.accusers(peer_id))
        return float(min(1.0, base * 2**doublings))

    def note(self, finding: Finding) -> None:
        """Remember it; a suspect is watched more closely."""
        self.findings.append(finding)
        del self.findings[:-MAX_FINDINGS]
        if finding.verdict is Verdict.SUSPECT:
            self._suspicions[finding.peer_id] += 1


def judge(*, auditor: bool, third: bool | None, third_auditor: bool | None) -> tuple[Verdict | None, Verdict | None]:
    """Who of the audited server and its auditor is to blame; None: not that one.

    Args:
        auditor: whether the two agree, now that the auditor was asked again.
        third: whether the audited server agrees with a third; third_auditor: whether the auditor does. None: there is
            no third.
    """
    if auditor:
        return None, Verdict.SUSPECT  # it has changed its mind
    if third and not third_auditor:
        return None, Verdict.LIED
    if third_auditor and not third:
        return Verdict.LIED, None
    return Verdict.SUSPECT, Verdict.SUSPECT
