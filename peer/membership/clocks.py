"""Whether this machine's clock agrees with those of the peers it knows. Records carry dates, so a wrong clock makes a
server invisible: its records are from the future, or expired on arrival."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import trio

from petals.dht.records import RecordError, dated
from petals.dht.troubles import CLOCK_ADVICE
from petals.peer.base.concurrency import gather
from petals.peer.membership.record_exchange import fetch_info
from petals.peer.net.host import Host
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import SwarmError
from petals.protocols.types import ModelId, PeerId

MAX_SKEW_S = 30.0
"""Records dated more than a minute ahead are refused; half of it is reported."""
ASK_OF = 5
FIRST_S = 5.0
AGAIN_S = 300.0
ANY_MODEL = ModelId("", "")


@dataclass(frozen=True, slots=True)
class Skew:
    """How far another clock is from ours."""

    ahead_s: float
    exact_s: float
    """Give or take: half the time between question and answer."""


def skew_of(reply: pb.InfoReply, asked_at: float, answered_at: float) -> Skew | None:
    """What an info reply says about its peer's clock; None: nothing.

    Args:
        asked_at, answered_at: Unix seconds, by our clock.
    """
    theirs = reply.unix_time
    if not theirs and reply.records:  # peers of earlier versions say it in their records only
        try:
            theirs = dated(reply.records[0])
        except RecordError:
            return None
    exact_s = (answered_at - asked_at) / 2
    return Skew(theirs - (asked_at + exact_s), exact_s) if theirs else None


class ClockWatch:
    """Compares clocks now and then. `run` must be running.

    Args:
        say: is told once in one line when our clock disagrees.
        clock: Unix seconds.
    """

    def __init__(self, host: Host, say: Callable[[str], None], clock: Callable[[], float] = time.time) -> None:
        self._host = host
        self._say = say
        self._clock = clock
        self._sentence = ""

    def sentences(self) -> list[str]:
        """For people; empty: the clocks agree, or nobody could be asked."""
        return [self._sentence] if self._sentence else []

    async def run(self) -> None:
        """Compare until cancelled."""
        pause_s = FIRST_S
        while True:
            await trio.sleep(pause_s)
            pause_s = AGAIN_S if await self.compare() else FIRST_S

    async def compare(self) -> bool:
        """Ask up to `ASK_OF` peers for the time; whether any answered."""
        peers = self._host.connected_peers()
        asked = random.sample(peers, min(ASK_OF, len(peers)))
        answers = await gather([partial(self._ask, peer) for peer in asked])
        ahead = [each.ahead_s for each in answers if isinstance(each, Skew) and each.exact_s < MAX_SKEW_S / 2]
        if not ahead:
            return False
        before, self._sentence = self._sentence, ""
        median = statistics.median(ahead)
        if abs(median) > MAX_SKEW_S:
            how = "behind" if median > 0 else "ahead of"
            whose = "that of the only peer asked" if len(ahead) == 1 else f"the clocks of {len(ahead)} peers"
            self._sentence = (
                f"this machine's clock is {abs(median):.0f} s {how} {whose}: records with a wrong date are refused; "
                f"{CLOCK_ADVICE}"
            )
            if not before:
                self._say(self._sentence)
        return True

    async def _ask(self, peer_id: PeerId) -> Skew:
        asked_at = self._clock()
        reply = await fetch_info(self._host, peer_id, (), ANY_MODEL)
        skew = skew_of(reply, asked_at, self._clock())
        if skew is None:
            raise SwarmError("it does not say")
        return skew
