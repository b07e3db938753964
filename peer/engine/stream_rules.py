"""What every stream of a server goes through: counted, bounded in time and bytes, and told what was wrong with it."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar

import trio
from google.protobuf.message import DecodeError
from torch import Tensor

from petals.models.blocks.adapters import Lora
from petals.models.blocks.block import BlockSpan
from petals.models.errors import ModelError
from petals.peer.accounting.ledger import nobody_counts
from petals.peer.base.config import ServeConfig
from petals.peer.base.rate_limit import MISTAKE
from petals.peer.engine.admission import Admission
from petals.peer.engine.cache_budget import CacheBudget, Lease, NoRoom
from petals.peer.engine.quotas import Rates
from petals.peer.engine.scheduler import Lane
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import PeerUnreachable, ProtocolViolation, RemoteProtocolError, SwarmError
from petals.protocols.inference import MAX_MESSAGE_BYTES
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.tensors import COMPRESSIONS, MAX_TENSOR_BYTES, decode_tensor
from petals.protocols.types import ModelId, PeerId

log = logging.getLogger(__name__)

GOODBYE_S = 5.0
GOODBYE_READS = 4096
"""Of 64 KiB at most: as much as the largest tensor that may have been announced."""

PATIENCE_S = 5.0
"""How long the step of a peer over its rate is held back rather than refused: less than any client's deadline."""
LONG_PATIENCE_S = 40.0
"""The same for a prompt or a batch, which clients wait longer for."""
DECODE_TOKENS = 8
"""New tokens of a step up to which it counts as decoding: drafts that are checked, too."""

WORK_SHARE = 0.5
"""Of the memory for requests, that one peer may hold."""
UNLEASED_BYTES = 64 << 10
"""Of a step's tensors: so small ones are bounded by the number of sessions, and decode steps are spared the lease."""

Adapter = str | Lora | None
"""A hosted one by its name, or one that the client sent."""
Plan = Sequence[tuple[str, pb.Tensor, int]]
Reply = pb.InferenceReply | pb.TrainingReply
Request = TypeVar("Request", pb.InferenceRequest, pb.TrainingRequest, pb.Push)


class Refused(SwarmError):
    """What we answer an asker whose request can not be served; ends the stream, and nothing else."""

    def __init__(self, code: pb.ErrorCode, message: str, retry_after_s: float = 0.0) -> None:
        self.code = code
        self.retry_after_s = retry_after_s
        super().__init__(message)

    def as_message(self) -> pb.Error:
        return pb.Error(code=self.code, message=str(self)[:1000], retry_after_ms=int(self.retry_after_s * 1000))


class Asker(MessageStream):
    """The other end of one stream that is served, and how long it is waited for.

    There is one cancel scope for all of the waits, whose deadline moves: one of its own for each of the three in a step
    costs more than the rest of them.
    """

    def __init__(self, stream: ByteStream) -> None:
        super().__init__(stream, max_message_bytes=MAX_MESSAGE_BYTES)
        self._scope = trio.CancelScope()
        self._seconds = math.inf
        self._was_cut = False

    @contextmanager
    def served(self) -> Iterator[None]:
        """While open, `within` and `cut` work.

        Raises:
            Refused: one of them has ended it.
        """
        with self._scope:
            yield
        if self._scope.cancelled_caught:
            if self._was_cut:
                raise Refused(pb.LEAVING, "this server is moving to other blocks")
            raise Refused(pb.OUT_OF_ORDER, f"nothing came for {self._seconds:.0f} s")

    def cut(self) -> None:
        """Serve it no more."""
        self._was_cut = True
        self._scope.cancel()

    def within(self, seconds: float) -> Self:
        """A context in which it is waited for, for so long at most. Not one in another, and nothing else in it."""
        self._seconds = seconds
        return self

    def __enter__(self) -> None:
        self._scope.deadline = trio.current_time() + self._seconds

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._scope.deadline = math.inf


class Guard:
    """The part of answering that all protocols about one loaded span share."""

    def __init__(
        self,
        model: ModelId,
        span: BlockSpan,
        lane: Lane,
        budget: CacheBudget,
        config: ServeConfig,
        admission: Admission,
        rates: Rates,
        *,
        gave: Callable[[PeerId, int], None] = nobody_counts,
        charge: Callable[[PeerId, int], None] = nobody_counts,
    ) -> None:
        """
        Args:
            gave: told whom we did how many block-tokens of work for, once it has been answered.
            charge: `Host.charge`: told of mistakes, and of streams that were worth opening.
        """
        self.model = model
        self.span = span
        self.lane = lane
        self.budget = budget
        self.config = config
        self.work = CacheBudget(config.work_bytes, max_share=WORK_SHARE, what="memory for requests (--work_mb)")
        """What is held for requests under way; leased before it is read."""
        self._admission = admission
        self._rates = rates
        self.gave = gave
        self._charge = charge
        self.leaving = False
        self._sessions: Counter[PeerId] = Counter()
        self._askers: set[Asker] = set()
        self._went = trio.Event()

    @property
    def sessions(self) -> int:
        """Inference sessions that are open now."""
        return self._sessions.total()

    async def until_idle(self) -> None:
        """Return when nobody is being served."""
        while self._askers:
            self._went = trio.Event()
            await self._went.wait()

    async def cut(self) -> None:
        """End whatever is being served, saying that we leave; its clients go on elsewhere."""
        for asker in self._askers:
            asker.cut()
        await self.until_idle()

    async def _guarded(
        self, stream: ByteStream, serve: Callable[[Asker], Awaitable[None]], reply: Callable[[pb.Error], Reply]
    ) -> None:
        """Serve one stream; what goes wrong by the asker's doing is told to it, and ends this stream only."""
        asker = Asker(stream)
        try:
            self._check_admitted(stream.remote_peer)
            with self._count(asker):
                await serve(asker)
            return
        except Refused as refusal:
            error = refusal.as_message()
        except ModelError as unsupported:  # a mask or prompt that does not fit what the blocks can do
            error = pb.Error(code=pb.UNSUPPORTED, message=str(unsupported)[:1000])
        except (RemoteProtocolError, ProtocolViolation) as violation:
            log.info("…%s broke the rules: %s", stream.remote_peer[-6:], violation)
            error = _blame(violation)
            self._charge(stream.remote_peer, MISTAKE)
        await self._say_goodbye(asker, reply(error))

    async def _lease(self, peer_id: PeerId, nbytes: int, wait_s: float) -> Lease:
        try:
            return await self.budget.acquire(peer_id, nbytes, min(wait_s, self.config.max_wait_s))
        except NoRoom as no_room:
            code = pb.QUOTA if no_room.for_ever else pb.BUSY
            raise Refused(code, str(no_room), 0.0 if no_room.for_ever else 1.0) from None

    async def _hold(self, peer_id: PeerId, nbytes: int, wait_s: float) -> Lease:
        """Lease memory for a request, before any of its payload is read. Raises Refused."""
        try:
            return await self.work.acquire(peer_id, nbytes, min(wait_s, self.config.max_wait_s))
        except NoRoom as no_room:
            code = pb.TOO_LONG if no_room.for_ever else pb.BUSY
            raise Refused(code, str(no_room), 0.0 if no_room.for_ever else 1.0) from None

    def _check_admitted(self, peer_id: PeerId) -> None:
        if not self._admission.admits(peer_id):
            raise Refused(pb.FORBIDDEN, f"these blocks are for peers that its operator knows, and not for {peer_id}")

    async def _turn(self, peer_id: PeerId, tokens: int, plan: Plan) -> None:
        """Wait until the peer may ask so much, before any of its payload is read.

        Raises:
            Refused: that would take longer than a client waits.
        """
        nbytes = sum(size for _, _, size in plan)
        patience_s = PATIENCE_S if tokens <= DECODE_TOKENS else LONG_PATIENCE_S
        turn = self._rates.take(peer_id, tokens=tokens, nbytes=nbytes, patience_s=patience_s)
        if turn.refused:
            when = f"; again in {turn.wait_s:.0f} s" if turn.wait_s else ", however long it waits"
            raise Refused(pb.QUOTA, f"one peer may not ask so much so fast here{when}", retry_after_s=turn.wait_s)
        if turn.wait_s:
            try:
                await trio.sleep(turn.wait_s)
            except trio.Cancelled:
                self._rates.charge(peer_id, tokens=-tokens, nbytes=-nbytes)
                raise

    def _lora_bytes(self, factors: Plan) -> int:
        nbytes = sum(size for _, _, size in factors)
        if nbytes > self.config.max_lora_bytes:
            raise Refused(pb.QUOTA, f"{nbytes} bytes of low-rank updates, at most {self.config.max_lora_bytes}")
        return nbytes

    def _encoding(self, asked: pb.Encoding) -> pb.Encoding:
        """How an answer travels: as asked, or shorter if the operator saves bytes."""
        return asked if asked != pb.RAW else COMPRESSIONS[self.config.compression]

    def _check_answer(self, tokens: int) -> None:
        """A small request in a short dtype may have an answer that is too large to travel."""
        if tokens * self.span.hidden_size * self.span.dtype.itemsize > MAX_TENSOR_BYTES:
            raise Refused(pb.TOO_LONG, f"the answer to {tokens} tokens would be over {MAX_TENSOR_BYTES} bytes")

    def _check_servable(self, asked: pb.Open | pb.TrainingRequest) -> range:
        if self.leaving:
            raise Refused(pb.LEAVING, "this server is shutting down")
        if asked.model_digest != self.model.digest:
            raise Refused(pb.UNKNOWN_MODEL, f"this server holds {self.model.name} ({self.model.digest[:12]})")
        held, start, end, adapter = self.span.blocks, asked.start_block, asked.end_block, asked.adapter
        if start < held.start or end > held.stop:
            raise Refused(pb.BLOCKS_NOT_HELD, f"blocks {start}:{end} asked, {held.start}:{held.stop} are held")
        if adapter and adapter not in self.span.adapters:
            raise Refused(pb.UNSUPPORTED, f"adapter {adapter[:100]!r} is not hosted here")
        if adapter and asked.lora:
            raise Refused(pb.UNSUPPORTED, "a hosted adapter and updates of the client's own do not go together")
        return range(start, end)

    def _check_wanted(self, asker: Asker) -> None:
        """Between two pieces of long work: raise PeerUnreachable when whoever asked for it has gone."""
        if asker.is_lost:
            raise PeerUnreachable("the asker has gone", asker.remote_peer)

    async def _answer(self, asker: Asker, reply: Reply, *payload: memoryview) -> None:
        """Send an answer; a peer that does not take it in time loses its stream, and with it its lease."""
        self._rates.charge(asker.remote_peer, nbytes=sum(piece.nbytes for piece in payload))
        with asker.within(self.config.payload_s):
            await asker.write_message(reply.SerializeToString(), *payload)

    async def _read_payload(self, asker: Asker, plan: Plan) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        with asker.within(self.config.payload_s):
            for name, header, nbytes in plan:
                tensors[name] = decode_tensor(header, await asker.read_payload(nbytes))
        return tensors

    @contextmanager
    def _count(self, asker: Asker) -> Iterator[None]:
        peer_id = asker.remote_peer
        if self._sessions[peer_id] >= self.config.max_sessions_per_peer:
            limit = self.config.max_sessions_per_peer
            raise Refused(pb.QUOTA, f"one peer may have {limit} sessions and requests here", retry_after_s=5.0)
        self._sessions[peer_id] += 1
        self._askers.add(asker)
        try:
            with asker.served():
                yield
        finally:
            self._askers.discard(asker)
            self._sessions[peer_id] -= 1
            self._sessions += Counter()  # drops peers that have none
            self._went.set()

    async def _say_goodbye(self, messages: MessageStream, reply: Reply) -> None:
        """Say what was wrong and end the stream. What the peer is still sending is read and dropped for a while: a
        reset in answer to it would overtake our words."""
        with trio.move_on_after(GOODBYE_S):
            await messages.write_message(reply.SerializeToString())
            await messages.close_write()
            for _ in range(GOODBYE_READS):
                if not await messages.stream.read(64 << 10):
                    return


def _blame(error: RemoteProtocolError | ProtocolViolation) -> pb.Error:
    late = isinstance(error, ProtocolViolation) and error.out_of_order
    return pb.Error(code=pb.OUT_OF_ORDER if late else pb.MALFORMED, message=str(error)[:1000])


def parse(message: Request, data: bytes) -> Request:
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise RemoteProtocolError("a message that does not decode") from None
    return message
