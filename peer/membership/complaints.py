"""Complaints about servers that answered wrongly: our own, and what we were told. Needs no torch.

They travel with `/petals/info`: who complains tells some peers, and every peer tells those who ask what it serves. A
complaint says that its accuser and the accused did talk, and what was signed; it can not say who is right. So it bans
nobody: it makes audits of the accused more frequent, up to a limit, for those who audit.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

from petals.peer.base.concurrency import apart
from petals.protocols.evidence import Complaint, EvidenceError, Verify, open_complaint
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

MAX_KEPT = 256
MAX_OF_ACCUSER = 8
"""One key cannot push out everybody else's; many keys can (docs/security.md)."""
MAX_OF_ACCUSED = 8
"""About one peer: three accusers raise the rate of its audits as far as it goes (client/audit/verdicts.py). So a group
that accuses one peer pushes out nothing that is said about others."""
MAX_TOLD = 8
"""In one answer to who asks, the latest."""


class ComplaintBook:
    """Complaints by accuser and accused, the latest of each.

    Args:
        clock: Unix seconds.
    """

    def __init__(self, verify: Verify, clock: Callable[[], float]) -> None:
        self._verify = verify
        self._clock = clock
        self._kept: OrderedDict[tuple[PeerId, PeerId], tuple[Complaint, bytes]] = OrderedDict()

    async def hear(self, words: Sequence[bytes]) -> int:
        """Keep what is believed of what somebody says; returns how many complaints are not believed.

        Each takes up to five signatures to verify, which is done in a thread, for one speaker at a time.
        """
        refused = 0
        for data in words:
            if any(data == known for _, known in self._kept.values()):
                continue  # everybody passes on the same ones
            try:
                complaint = await apart(open_complaint, data, now=self._clock(), verify=self._verify)
            except EvidenceError as error:
                log.info("not believed: %s", error)
                refused += 1
                continue
            self._keep(complaint, data)
        return refused

    def _keep(self, complaint: Complaint, data: bytes) -> None:
        key = (complaint.accuser, complaint.accused)
        known = self._kept.get(key)
        if known is not None and known[0].issued_at >= complaint.issued_at:
            return
        if known is None and sum(accused == complaint.accused for _, accused in self._kept) >= MAX_OF_ACCUSED:
            return
        self._kept[key] = (complaint, data)
        self._kept.move_to_end(key)
        of_accuser = [other for other in self._kept if other[0] == complaint.accuser]
        for oldest in of_accuser[:-MAX_OF_ACCUSER]:
            del self._kept[oldest]
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def accusers(self, peer_id: PeerId, *, besides: PeerId | None = None) -> int:
        """How many peers complain about this one, `besides` somebody: who complains hears it from others again."""
        return sum(complaint.accused == peer_id and complaint.accuser != besides for complaint in self._valid())

    def about(self, digest: str) -> list[bytes]:
        """Complaints about servers of a model to pass on, as they came; empty: of any model."""
        wanted = [
            self._kept[complaint.accuser, complaint.accused][1]
            for complaint in self._valid()
            if digest in ("", complaint.answer.statement.model_digest)
        ]
        return wanted[-MAX_TOLD:]

    def _valid(self) -> list[Complaint]:
        now = self._clock()
        for key in [key for key, (complaint, _) in self._kept.items() if complaint.expires_at <= now]:
            del self._kept[key]
        return [complaint for complaint, _ in self._kept.values()]
