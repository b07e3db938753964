"""What the directory met that people should hear of: records that were refused, and another process with our key. Pure.

A counter of refused records helps nobody who does not look at it. Here the reasons are kept for a while, per peer, and
put into sentences for whoever misses a server: the error about missing blocks, `petals status`, the swarm page.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from petals.dht.records import MAX_CLOCK_SKEW_S, RecordError, ServerRecord, ServerState
from petals.protocols.types import PeerId

KEPT_S = 300.0
MAX_KEPT = 64
"""Peers whose refusals are kept; a flood pushes out the oldest."""
NAMESAKE_S = 120.0
"""Another process with our key is believed to run for so long after its last sign of life."""
CLOCK_ADVICE = "let the clocks follow NTP (timedatectl set-ntp true)"


@dataclass(frozen=True, slots=True)
class _Refusal:
    at: float
    reason: str
    text: str
    ahead_s: float | None


class Refusals:
    """Records that were not believed lately: what servers said of themselves."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: dict[PeerId, _Refusal] = {}

    def note(self, peer_id: PeerId, error: RecordError, *, fresh: bool) -> None:
        """A record of `peer_id` was refused. `fresh`: it was issued for us, so its date is that peer's clock."""
        ahead_s = error.ahead_s if fresh or (error.ahead_s or 0.0) > MAX_CLOCK_SKEW_S else None
        if error.reason == "time" and ahead_s is None:
            return  # an old record that somebody kept: nothing is wrong with it but its age
        self._kept.pop(peer_id, None)
        if len(self._kept) >= MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[peer_id] = _Refusal(self._clock(), error.reason, str(error), ahead_s)

    def forgive(self, peer_id: PeerId) -> None:
        """A record of `peer_id` was believed."""
        self._kept.pop(peer_id, None)

    def sentences(self) -> list[str]:
        """What was refused in the last five minutes and why, a sentence per reason."""
        since = self._clock() - KEPT_S
        kept = [refusal for refusal in self._kept.values() if refusal.at >= since]
        sentences = []
        for how, sign in (("ahead of", 1), ("behind", -1)):
            skews = [sign * each.ahead_s for each in kept if each.ahead_s is not None and sign * each.ahead_s > 0]
            if skews:
                one = len(skews) == 1
                sentences.append(
                    f"{_records(len(skews))} refused: {'its' if one else 'their'} clock is "
                    f"{statistics.median(skews):.0f} s {how} this machine's; {CLOCK_ADVICE}"
                )
        others = [each for each in kept if each.ahead_s is None]
        for reason in sorted({each.reason for each in others}):
            alike = [each for each in others if each.reason == reason]
            sentences.append(f"{_records(len(alike))} refused: {alike[-1].text}")
        return sentences


def _records(count: int) -> str:
    return "1 server record was" if count == 1 else f"{count} server records were"


class Namesake:
    """Whether another process announces with our key.

    Theory. The directory keeps one record per peer ID, so two processes with one key take turns in it, and readers see
    the blocks of one of them. Each process signs a random `instance` into its records. One with another instance may be
    that of a predecessor that crashed; so it counts only if it was issued after we started and its sequence number grew
    between two sightings, which only a living process can do.

    Args:
        instance: ours.
        say: is told once in one line.
    """

    def __init__(self, instance: bytes, clock: Callable[[], float]) -> None:
        self.instance = instance
        self.say: Callable[[str], None] = lambda line: None
        self._clock = clock
        self._started_at = clock()
        self._sequences: dict[bytes, int] = {}
        self._found: tuple[float, ServerRecord] | None = None

    def note(self, record: ServerRecord) -> None:
        """A record under our own key, whose signature is ours."""
        if record.instance in (b"", self.instance) or record.state is ServerState.OFFLINE:
            return
        if record.issued_at <= self._started_at:
            return
        known = self._sequences.setdefault(record.instance, record.sequence)
        if record.sequence > known:
            new = self.found is None
            self._found = (self._clock(), record)
            if new:
                self.say(self.sentences()[0])

    @property
    def found(self) -> ServerRecord | None:
        """What it last announced; None: there is none, or it has been silent for long."""
        if self._found is None or self._clock() - self._found[0] > NAMESAKE_S:
            return None
        return self._found[1]

    def sentences(self) -> list[str]:
        """For people; empty: there is no such process."""
        if (record := self.found) is None:
            return []
        where = f" at {record.addrs[0].partition('/p2p/')[0]}" if record.addrs else ""
        return [
            f"another process{where} uses this peer's key and holds blocks {record.blocks.start}:{record.blocks.stop}: "
            "others see one of the two only; give each its own --identity"
        ]
