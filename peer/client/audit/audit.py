"""Audits: some answers are computed again by somebody else, beside the session, and compared.

Which answers, dice decide after they have come; every session asks for signatures, so nothing tells a server that it
will be checked. Whoever checks is asked for an ordinary session: it is told the inputs of the audited server, as one
prompt as far as it lags behind, and answers for all of them. Such a session stays open, so that a session's audits
cost about one prefill of what it was told, however many there are.

When two disagree, both have the same to gain. The auditor is asked again, in a new session with the very same steps, so
that it signs an answer to the same inputs; and a third is asked, or, where that is wanted, we compute ourselves. Who
stands alone has lied. Where there is no third, both are suspects, and watched more closely.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import trio
from torch import Tensor

from petals.peer.base.concurrency import gather
from petals.peer.client.audit.comparison import error_between, rounding_of, tolerance_of
from petals.peer.client.audit.signatures import Answer, same_history
from petals.peer.client.audit.verdicts import Finding, Trust, Verdict, judge
from petals.peer.client.hops.hop import Hop, SessionSpec, StepInput, StepOutput, for_blocks
from petals.peer.client.hops.replay import as_one_prompt
from petals.peer.client.routing.local_blocks import is_home
from petals.peer.client.routing.routing import Route, RouteHop
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import RemoteError, RemoteProtocolError, RouteError, SwarmError, WrongAnswer
from petals.protocols.evidence import SignedAnswer, Verify
from petals.protocols.types import PeerId

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""So many auditors are tried, where they fail one after another."""
MAX_WAITING = 512
"""Answers of one session that wait for their audit; each keeps its numbers."""
INLINE_VALUES = 1 << 16
"""Larger answers are compared in a worker thread."""
FINISH_S = 120.0
"""How long audits may go on after their session has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Office:
    """What audits need of the client, the same for all sessions of a model."""

    trust: Trust
    dice: Callable[[], float]
    """Uniform numbers in [0, 1)."""
    verify: Verify
    open_hop: Callable[[RouteHop, SessionSpec], Awaitable[Hop]]
    liars: Callable[[], frozenset[PeerId]]
    """Who has been caught already: there is nothing to find out about them."""
    report: Callable[[PeerId, RemoteError], None]
    precision_of: Callable[[PeerId], tuple[str, str] | None]
    """What a server announces: dtype and quantisation; None: it is not known any more."""
    complain: Callable[[SignedAnswer, tuple[SignedAnswer, ...], Finding], None]
    """Tell the swarm: a wrong answer, what others answered, and how wrong it was."""
    say: Callable[[str], None]


@dataclass(eq=False)
class _Examiner:
    """Servers that hold the blocks of one hop together, in a session that follows the hop's."""

    of: Hop
    route: Route
    hops: list[Hop]
    told: tuple[StepInput, ...] = ()

    @classmethod
    async def open(
        cls, of: Hop, route: Route, open_hop: Callable[[RouteHop, SessionSpec], Awaitable[Hop]]
    ) -> _Examiner:
        results = await gather([partial(open_hop, leg, of.spec) for leg in route.hops])
        hops = [result for result in results if isinstance(result, Hop)]
        for result in results:
            if not isinstance(result, Hop):
                await gather([hop.reset for hop in hops])
                raise result
        return cls(of, route, hops)

    @property
    def peers(self) -> frozenset[PeerId]:
        return frozenset(leg.peer_id for leg in self.route.hops)

    @property
    def encoding(self) -> pb.Encoding:
        """How its latest answer travelled."""
        return self.hops[-1].encoding

    def can_follow(self, history: tuple[StepInput, ...]) -> bool:
        """Whether a roll-back leads there: rows that were reordered stay reordered."""
        return all(step.hypo_ids is None for step in self.told[same_history(self.told, history) :])

    async def recompute(self, answers: list[Answer]) -> list[Tensor]:
        """What should have been answered; `answers` in the order of one history."""
        history = answers[-1].history
        known = min(same_history(self.told, history), len(answers[0].history) - 1)
        steps = list(history[known:])
        self.told = history
        told = steps if any(step.hypo_ids is not None for step in steps) else as_one_prompt(steps)
        outputs = await self._run(told)
        if told[0] is steps[0] and len(told) == len(steps):
            return [outputs[len(answer.history) - 1 - known] for answer in answers]
        return [_cut(told, outputs, answer.step) for answer in answers]

    async def answer(self, history: tuple[StepInput, ...]) -> Answer:
        """The answer to the last step, told with the very same steps; only of a new one."""
        steps = list(history)
        for hop in self.hops[:-1]:
            outputs = await hop.replay([for_blocks(s, self.of.blocks, hop.blocks) for s in steps], want_outputs=True)
            steps = [replace(s, hidden=o.to(s.hidden.dtype)) for s, o in zip(steps, outputs, strict=True)]
        last = self.hops[-1]
        steps = [for_blocks(step, self.of.blocks, last.blocks) for step in steps]
        if len(steps) > 1:
            await last.replay(steps[:-1], want_outputs=False)
        return Answer.of(last, await last.step(steps[-1]))

    async def _run(self, steps: list[StepInput]) -> list[Tensor]:
        outputs: list[Tensor] = []
        for hop in self.hops:
            told = [for_blocks(step, self.of.blocks, hop.blocks) for step in steps]
            outputs = await hop.replay(told, want_outputs=True)
            hop.history.clear()  # never told again
            steps = [replace(s, hidden=o.to(s.hidden.dtype)) for s, o in zip(steps, outputs, strict=True)]
        return outputs

    async def close(self) -> None:
        await gather([hop.close for hop in self.hops])


def _cut(told: list[StepInput], outputs: list[Tensor], wanted: StepInput) -> Tensor:
    """The rows of one step out of the output of a prompt, which may have been told in chunks."""
    start, stop = wanted.position, wanted.position + wanted.hidden.shape[1]
    parts = [
        output[:, max(start - step.position, 0) : max(stop - step.position, 0)]
        for step, output in zip(told, outputs, strict=True)
    ]
    parts = [part for part in parts if part.shape[1]]
    return torch.cat(parts, dim=1)


class SessionAudit:
    """Audits the answers of one session. `run` must be running; it ends some time after `end`.

    Args:
        base_rate: the probability of an audit, for servers with a clean record.
        find: (hop, peers to avoid) -> a route over the same blocks, of servers that say they compute alike.
        at_home: (hop) -> a route that is ourselves, to decide where two disagree; None: we do not compute.
        doubt: told of blocks from which on the session has to be computed again.
    """

    def __init__(
        self,
        office: Office,
        base_rate: float,
        find: Callable[[Hop, frozenset[PeerId]], Route],
        at_home: Callable[[Hop], Awaitable[Route]] | None,
        doubt: Callable[[int], None],
    ) -> None:
        self._office = office
        self._base_rate = base_rate
        self._find = find
        self._at_home = at_home
        self._doubt = doubt
        self._waiting: deque[Answer] = deque()
        self._examiners: dict[int, _Examiner] = {}
        self._news = trio.Event()
        self.ended = self._began = False
        self._scope = trio.CancelScope()
        self.done = trio.Event()
        """Nothing waits any more."""

    def note(self, hop: Hop, output: StepOutput) -> None:
        """An answer has come: throw the dice."""
        trust = self._office.trust
        if is_home(hop.peer_id) or self._office.dice() >= trust.rate(self._base_rate, hop.peer_id):
            return
        if len(self._waiting) >= MAX_WAITING:
            trust.unchecked += 1
            return
        self._waiting.append(Answer.of(hop, output))
        self._news.set()

    def end(self) -> None:
        """No answer will come any more."""
        self.ended = True
        if not self._began:
            self.done.set()
        self._scope.deadline = trio.current_time() + FINISH_S
        self._news.set()

    async def run(self) -> None:
        """Check what `note` has picked."""
        self._began = True
        try:
            with self._scope:
                while self._waiting or not self.ended:
                    if not self._waiting:
                        self._news = trio.Event()
                        await self._news.wait()
                        continue
                    answers = self._take()
                    try:
                        await self._check(answers)
                    except SwarmError as error:
                        log.warning("an audit came to nothing: %s", error)
                        self._office.trust.unchecked += len(answers)
                        await self._drop(answers[0].hop)
            self._office.trust.unchecked += len(self._waiting)
        finally:
            self.done.set()
            with trio.CancelScope(shield=True):  # each goodbye is bounded by itself
                await gather([examiner.close for examiner in self._examiners.values()])

    def _take(self) -> list[Answer]:
        """The oldest answer, and those that go on from there at the same server."""
        taken, left = [self._waiting.popleft()], deque[Answer]()
        for answer in self._waiting:
            (taken if answer.follows(taken[-1]) else left).append(answer)
        self._waiting = left
        return taken

    async def _check(self, answers: list[Answer]) -> None:
        office, hop = self._office, answers[0].hop
        if hop.peer_id in office.liars():
            return
        said = (answers[0].dtype, hop.quant_type)
        if (office.precision_of(hop.peer_id) or said) != said:
            office.report(hop.peer_id, RemoteProtocolError("it computes otherwise than it announces", hop.peer_id))
        if hop.public_key and not (await answers[-1].signed()).is_genuine(office.verify):
            office.report(hop.peer_id, RemoteProtocolError("an answer that is not signed as promised", hop.peer_id))
        examined = await self._examine(answers)
        if examined is None:
            office.trust.unchecked += len(answers)
            return
        examiner, right = examined
        for answer, hidden in zip(answers, right, strict=True):
            office.trust.audited += 1
            error = await _unhurried(answer.hidden, partial(_error, answer, hidden, examiner.encoding))
            if error > tolerance_of(answer.dtype, hop.quant_type):
                await self._dispute(answer, examiner, hidden, error)
                return

    async def _examine(self, answers: list[Answer]) -> tuple[_Examiner, list[Tensor]] | None:
        """What others come to; None: nobody else can."""
        hop, avoid = answers[0].hop, frozenset({answers[0].hop.peer_id})
        for _ in range(ATTEMPTS):
            examiner = self._examiners.get(id(hop))
            if examiner is not None and not examiner.can_follow(answers[-1].history):
                await self._drop(hop)
                examiner = None
            peers: frozenset[PeerId] = frozenset()
            try:
                if examiner is None:
                    route = await self._route(hop, avoid)
                    peers = frozenset(leg.peer_id for leg in route.hops)
                    examiner = self._examiners[id(hop)] = await _Examiner.open(hop, route, self._office.open_hop)
                return examiner, await examiner.recompute(answers)
            except RouteError:
                return None
            except RemoteError as error:
                peers |= frozenset() if examiner is None else examiner.peers
                log.info("blocks %d:%d are not audited: %s", hop.blocks.start, hop.blocks.stop, error)
                avoid |= peers if error.peer_id is None else {error.peer_id}
                if error.peer_id is not None:
                    self._office.report(error.peer_id, error)
                await self._drop(hop)
        return None

    async def _route(self, hop: Hop, avoid: frozenset[PeerId]) -> Route:
        try:
            return self._find(hop, avoid)
        except RouteError:
            if self._at_home is None:
                raise
            return await self._at_home(hop)

    async def _drop(self, hop: Hop) -> None:
        examiner = self._examiners.pop(id(hop), None)
        if examiner is not None:
            await examiner.close()

    # -- who lies ----------------------------------------------------------------------------------------------------

    async def _dispute(self, answer: Answer, examiner: _Examiner, hidden: Tensor, error: float) -> None:
        hop, tolerance = answer.hop, tolerance_of(answer.dtype, answer.hop.quant_type)
        finding = Finding(hop.peer_id, Verdict.SUSPECT, hop.blocks, answer.step.position, error, tolerance)
        log.warning("blocks %d:%d: two servers disagree (error %.1e)", hop.blocks.start, hop.blocks.stop, error)
        await self._drop(hop)
        again = await self._hear(answer, examiner.route)
        theirs, encoding = (hidden, examiner.encoding) if again is None else (again.hidden, again.encoding)
        third = None
        try:
            avoid = examiner.peers | {hop.peer_id}
            route = self._find(hop, avoid) if self._at_home is None else await self._at_home(hop)
            third = await self._hear(answer, route)
        except RouteError:
            log.info("nobody is left to decide")
        mine, yours = judge(
            auditor=_error(answer, theirs, encoding) <= tolerance,
            third=None if third is None else _error(answer, third.hidden, third.encoding) <= tolerance,
            third_auditor=None if third is None else _between(theirs, encoding, third, answer) <= tolerance,
        )
        if mine is not None:
            await self._blame(answer, replace(finding, verdict=mine), [again, third])
            if mine is Verdict.LIED:
                self._doubt(hop.blocks.start)
        if yours is not None:
            for peer_id in filter(lambda each: not is_home(each), examiner.peers):
                # Of several in a row it is not known which one.
                verdict = yours if len(examiner.peers) == 1 else Verdict.SUSPECT
                blamed = replace(finding, peer_id=peer_id, verdict=verdict)
                await self._blame(again, blamed, [answer, third])

    async def _hear(self, answer: Answer, route: Route) -> Answer | None:
        """The answer of others to the same steps; None: they fail."""
        try:
            examiner = await _Examiner.open(answer.hop, route, self._office.open_hop)
            try:
                return await examiner.answer(answer.history)
            finally:
                with trio.CancelScope(shield=True):
                    await examiner.close()
        except RemoteError as error:
            log.info("no witness: %s", error)
            return None

    async def _blame(self, answer: Answer | None, finding: Finding, witnesses: list[Answer | None]) -> None:
        office = self._office
        office.trust.note(finding)
        office.say(finding.describe())
        if finding.verdict is not Verdict.LIED:
            return
        office.report(finding.peer_id, WrongAnswer(finding.describe(), finding.peer_id))
        signed = await self._evidence(answer, finding.blocks)
        if signed is not None:
            others = [await self._evidence(each, finding.blocks) for each in witnesses]
            office.complain(signed, tuple(each for each in others if each is not None), finding)

    async def _evidence(self, answer: Answer | None, blocks: range) -> SignedAnswer | None:
        """What one server has signed about all of `blocks`; None: nothing."""
        if answer is None or not answer.hop.public_key or answer.hop.blocks != blocks:
            return None
        signed = await answer.signed()
        return signed if signed.is_genuine(self._office.verify) else None


async def _unhurried(hidden: Tensor, work: Callable[[], float]) -> float:
    """`work()`, which looks at tensors of this size, where it holds no token up."""
    return work() if hidden.numel() <= INLINE_VALUES else await trio.to_thread.run_sync(work)


def _error(answer: Answer, right: Tensor, encoding: pb.Encoding) -> float:
    rounding = rounding_of(answer.hidden, answer.encoding) + rounding_of(right, encoding)
    return error_between(answer.hidden, right, rounding=rounding, rows=answer.rows)


def _between(theirs: Tensor, encoding: pb.Encoding, third: Answer, about: Answer) -> float:
    rounding = rounding_of(theirs, encoding) + rounding_of(third.hidden, third.encoding)
    return error_between(theirs, third.hidden, rounding=rounding, rows=about.rows)
