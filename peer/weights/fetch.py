"""Fetching a checkpoint from the peers that serve it: what is needed, from several at once, nothing believed.

First the documents: the preimage of the digest proves itself; sections are compared between their holders, and with
all that the digest vouches for (models/source/weights.py). Then the pieces, whose hashes the sections list: each is
checked before it is written. Who sends a piece that is not what it should be is asked nothing more; its pieces come
from the others.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from petals.dht.directory import Directory
from petals.dht.records import ServerRecord, ServerState
from petals.models.errors import DocumentError
from petals.models.source.checkpoint import Checkpoint
from petals.models.source.partial import PartialCheckpoint, PartialSection, Piece
from petals.models.source.weights import (
    FILES,
    FIRST_BLOCK,
    INDEX,
    OTHERS,
    PREIMAGE,
    Section,
    Voucher,
    decode_index,
    decode_section,
    open_preimage,
    section_names,
    section_of,
)
from petals.peer.base.concurrency import apart, gather
from petals.peer.client.hops.hop import answer_within, error_of
from petals.peer.membership.observer import SwarmObserver
from petals.peer.net.host import Host
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import (
    PeerBusy,
    PeerUnreachable,
    RemoteError,
    RemoteProtocolError,
    SwarmError,
    UserError,
)
from petals.protocols.stream import MessageStream
from petals.protocols.types import ModelId, PeerId
from petals.protocols.weights import (
    MAX_DOCUMENT_BYTES,
    MAX_REPLY_BYTES,
    WEIGHTS_V1,
    document_request,
    parse_reply,
    piece_request,
)

log = logging.getLogger(__name__)

SENDERS = 8
"""So many are asked where there are, and more where blocks would have no holder among them."""
SECTIONS_AT_ONCE = 4
"""Asked for, each on a stream to every sender: senders allow 8."""
STREAMS_PER_SENDER = 3
"""A request and its answer take turns on a stream: several hide the round trips."""
DOCUMENT_S = 300.0
"""The sender may have to read and hash a block of gigabytes first."""
PIECE_S = 60.0
PATIENCE = 4
"""Failures in a row after which a sender is given up."""
REPORT_S = 5.0


@dataclass(slots=True)
class Sender:
    """A peer that serves the model."""

    peer_id: PeerId
    addrs: tuple[str, ...]
    holds: set[int] = field(default_factory=set)
    """Sections that it gives, as we want them."""


class SwarmWeights:
    """The weights of one model, as far as they are here and as its swarm has them.

    Attributes:
        received: bytes of pieces by sender, whether they were right or not.
        banned: senders of what was not right.
    """

    def __init__(self, host: Host, directory: Directory, model: ModelId, say: Callable[[str], None]) -> None:
        self.model = model
        self.partial = PartialCheckpoint(model.digest)
        self.received: Counter[PeerId] = Counter()
        self.banned: set[PeerId] = set()
        self._host = host
        self._directory = directory
        self._say = say
        self._one = trio.Lock()

    async def open(self) -> Checkpoint:
        """The checkpoint with its small files; tensors are fetched by `fetch`.

        Raises:
            UserError: nobody gives it. ModelError: it is none, or the disk is full.
        """
        async with self._one:
            found = await trio.to_thread.run_sync(self.partial.open)
            while found is None:
                senders = await self._find_senders([FILES])
                voucher = await self._voucher(senders)
                if await self._fetch([FILES], senders, voucher):
                    await self._describe(senders, voucher)
                    found = await trio.to_thread.run_sync(self.partial.open)
            return found

    async def fetch(self, sections: Iterable[int]) -> None:
        """Bring these sections of the opened checkpoint here, those that are not.

        Raises:
            UserError: nobody gives one of them. ModelError: the disk is full.
        """
        async with self._one:
            while wanted := [section for section in sections if not self.partial.has(section)]:
                senders = await self._find_senders(wanted)
                await self._fetch(wanted, senders, await self._voucher(senders))

    async def fetch_blocks(self, blocks: range) -> None:
        """`fetch` for what a server of `blocks` loads."""
        await self.fetch([section_of(block) for block in blocks])

    async def fetch_others(self) -> None:
        """`fetch` for what a client loads: embeddings and head."""
        await self.fetch([OTHERS])

    # -- documents -------------------------------------------------------------------------------------------------

    async def _find_senders(self, sections: Sequence[int]) -> list[Sender]:
        records = [
            record
            for record in await self._directory.lookup(self.model)
            if record.state is not ServerState.OFFLINE and record.peer_id not in {self._host.peer_id, *self.banned}
        ]
        if not records:
            others = ", except those that sent what was not right" if self.banned else ""
            raise UserError(f"nobody in the swarm serves {self.model.name} ({self.model.digest[:12]}){others}")
        blocks = [section - FIRST_BLOCK for section in sections if section >= FIRST_BLOCK]
        return [Sender(record.peer_id, record.addrs) for record in choose_senders(records, blocks)]

    async def _voucher(self, senders: Sequence[Sender]) -> Voucher:
        """What the digest vouches for. Leaves out of `senders`' reach nobody: whoever answers, proves it."""
        refusals: list[str] = []
        for sender in senders:
            try:
                data, _ = await self._document(sender, PREIMAGE)
                return await apart(open_preimage, self.model.digest, data)
            except (RemoteProtocolError, DocumentError) as lie:
                self._ban(sender, str(lie))
            except RemoteError as refusal:
                refusals.append(str(refusal))
        raise UserError(f"nobody gives the weights of {self.model.name}: {'; '.join(refusals[:3]) or 'all were wrong'}")

    async def _describe(self, senders: Sequence[Sender], voucher: Voucher) -> None:
        """Make a checkpoint of the files and somebody's index.

        Raises: UserError: nobody has a right one.
        """
        for sender in senders:
            try:
                data, _ = await self._document(sender, INDEX)
                index = await apart(decode_index, data)
                name = self.model.name
                return await trio.to_thread.run_sync(partial(self.partial.describe, name, voucher, index))
            except (RemoteProtocolError, DocumentError) as lie:
                self._ban(sender, str(lie))
            except RemoteError as error:
                log.info("no index: %s", error)
        raise UserError(f"nobody gives the index of {self.model.name}; ask again later")

    async def _agreed(
        self, section: int, senders: Sequence[Sender], voucher: Voucher, opened: Checkpoint | None
    ) -> Section:
        """A section as most of its holders have it; only these are asked for its pieces.

        Raises:
            UserError: nobody holds it, or as many say this as that.
        """
        calls = [partial(self._document, sender, section, hash_only=True) for sender in senders]
        answers = await gather(calls)
        said: dict[bytes, list[Sender]] = {}
        for sender, answer in zip(senders, answers, strict=True):
            if isinstance(answer, RemoteProtocolError):
                self._ban(sender, str(answer))
            elif isinstance(answer, SwarmError):
                log.info("…%s gives no section %d: %s", sender.peer_id[-6:], section, answer)
            else:
                said.setdefault(answer[1], []).append(sender)
        for sha256, holders in _by_weight(said, section, voucher):
            for sender in holders:
                try:
                    data, _ = await self._document(sender, section)
                    content = await apart(_open_section, section, data, sha256, voucher)
                    _check_names(section, content, opened)
                except (RemoteProtocolError, DocumentError) as lie:
                    self._ban(sender, str(lie))
                    continue
                except RemoteError as error:
                    log.info("no section %d: %s", section, error)
                    continue
                for holder in holders:
                    if holder.peer_id not in self.banned:
                        holder.holds.add(section)
                return content
        reasons = [str(answer) for answer in answers if isinstance(answer, SwarmError)]
        raise UserError(
            f"nobody gives {_title(section)} of {self.model.name}: {'; '.join(reasons[:3]) or 'it is wrong'}"
        )

    async def _document(self, sender: Sender, number: int, *, hash_only: bool = False) -> tuple[bytes, bytes]:
        """(document, its SHA-256 as announced).

        Raises: RemoteError.
        """
        data = bytearray()
        async with self._stream(sender) as messages:
            with answer_within(DOCUMENT_S, sender.peer_id):
                while True:
                    asked = document_request(self.model.digest, number, len(data), hash_only=hash_only)
                    part, payload = await _ask(messages, asked)
                    data += payload
                    if len(part.sha256) != 32 or len(data) > min(part.total, MAX_DOCUMENT_BYTES):
                        raise RemoteProtocolError("a document that is none", sender.peer_id)
                    if hash_only or len(data) == part.total:
                        return bytes(data), part.sha256
                    if not payload:
                        raise RemoteProtocolError("a document without an end", sender.peer_id)

    # -- pieces ----------------------------------------------------------------------------------------------------

    async def _fetch(self, sections: Sequence[int], senders: Sequence[Sender], voucher: Voucher) -> bool:
        """Bring `sections` here. False: some turned out not to be what the digest vouches for; they are missing, and
        their senders banned."""
        opened = await trio.to_thread.run_sync(self.partial.open)
        places: dict[int, PartialSection] = {}
        for some in (sections[start : start + SECTIONS_AT_ONCE] for start in range(0, len(sections), SECTIONS_AT_ONCE)):
            calls = [partial(self._agreed, section, senders, voucher, opened) for section in some]
            for section, content in zip(some, await gather(calls), strict=True):
                if isinstance(content, SwarmError):
                    raise content
                begin = partial(self.partial.begin, section, content, voucher)
                places[section] = await trio.to_thread.run_sync(begin)
        missing = [piece for place in places.values() for piece in await trio.to_thread.run_sync(place.missing)]
        wanted = sum(place.content.nbytes for place in places.values())
        what = f"{_titles(sections)} of {self.model.name}"
        report = Report(what, wanted - sum(piece.nbytes for piece in missing), wanted)
        if missing:
            self._say(report.first_line(sum(bool(sender.holds) for sender in senders)))
            await self._bring(places, _Queue(missing, self.banned), senders, report)
            self._say(report.last_line(trio.current_time()))
        right = True
        for section, place in places.items():
            try:
                await trio.to_thread.run_sync(place.finish)
            except DocumentError as lie:
                right = False
                for sender in senders:
                    if section in sender.holds:
                        self._ban(sender, str(lie))
        return right

    async def _bring(
        self, places: Mapping[int, PartialSection], queue: _Queue, senders: Sequence[Sender], report: Report
    ) -> None:
        report.start(trio.current_time())
        async with trio.open_nursery() as reporting:
            reporting.start_soon(self._keep_reporting, report)
            async with trio.open_nursery() as nursery:
                for sender in senders:
                    if sender.holds:
                        for _ in range(STREAMS_PER_SENDER):
                            nursery.start_soon(self._work, sender, places, queue, report)
            reporting.cancel_scope.cancel()
        if not queue.finished:
            raise UserError(
                f"nobody is left who gives {report.what}; {report.done / 1e6:,.0f} of {report.total / 1e6:,.0f} MB are "
                "here and stay: ask again later"
            )

    async def _work(self, sender: Sender, places: Mapping[int, PartialSection], queue: _Queue, report: Report) -> None:
        """Fetch pieces from one sender over one stream at a time, until none is left or the sender is of no use."""
        failures = 0
        while failures < PATIENCE and await queue.has_work(sender):
            try:
                async with self._stream(sender) as messages:
                    while (piece := await queue.take(sender)) is not None:
                        with queue.lent(piece) as keep:
                            data = await self._piece(messages, piece)
                            self.received[sender.peer_id] += len(data)
                            write = partial(places[piece.section].write, piece, data)
                            if not await trio.to_thread.run_sync(write):
                                raise RemoteProtocolError("a piece that is not what it should be", sender.peer_id)
                            keep()
                        report.done += piece.nbytes
                        failures = 0
            except PeerBusy as busy:
                await trio.sleep(busy.retry_after_s or 1.0)
            except RemoteProtocolError as lie:
                self._ban(sender, str(lie))
                queue.wake()
            except RemoteError as error:
                log.info("a piece did not come: %s", error)
                failures += 1
                await trio.sleep(0.1 * 2**failures)

    async def _piece(self, messages: MessageStream, piece: Piece) -> bytearray:
        with answer_within(PIECE_S, messages.remote_peer):
            _, data = await _ask(messages, piece_request(self.model.digest, piece.section, piece.sha256))
            return data

    async def _keep_reporting(self, report: Report) -> None:
        while True:
            await trio.sleep(REPORT_S)
            self._say(report.line(trio.current_time()))

    @asynccontextmanager
    async def _stream(self, sender: Sender) -> AsyncIterator[MessageStream]:
        stream = await self._host.open_stream(sender.peer_id, WEIGHTS_V1, addrs=sender.addrs)
        messages = MessageStream(stream, max_message_bytes=MAX_REPLY_BYTES)
        try:
            yield messages
            await messages.close()
        except BaseException:
            await messages.reset()
            raise

    def _ban(self, sender: Sender, why: str) -> None:
        if sender.peer_id not in self.banned:
            self.banned.add(sender.peer_id)
            self._say(f"peer …{sender.peer_id[-6:]} is not asked for weights any more: {why}")


def _open_section(section: int, data: bytes, sha256: bytes, voucher: Voucher) -> Section:
    """A section's document, checked. Raises DocumentError."""
    if hashlib.sha256(data).digest() != sha256:
        raise DocumentError("another document than announced")
    voucher.check_section(section, data)
    return decode_section(section, data)


class _Queue:
    """Pieces to fetch, by section; handed out one by one, and back when they did not come."""

    def __init__(self, pieces: Iterable[Piece], banned: set[PeerId]) -> None:
        self._waiting: dict[int, deque[Piece]] = {}
        self._lent = 0
        self._banned = banned
        self._changed = trio.Event()
        for piece in pieces:
            self._waiting.setdefault(piece.section, deque()).append(piece)

    @property
    def finished(self) -> bool:
        return not self._lent and not any(self._waiting.values())

    async def has_work(self, sender: Sender) -> bool:
        """Wait until there is a piece for `sender`; False: never again."""
        while not self._banned_or_done(sender):
            if self._next(sender) is not None:
                return True
            await self._changed.wait()
        return False

    async def take(self, sender: Sender) -> Piece | None:
        """The next piece for `sender`; None: there are none just now. It must be `lent` at once."""
        await trio.lowlevel.checkpoint()
        queue = None if sender.peer_id in self._banned else self._next(sender)
        return None if queue is None else queue.popleft()

    def lent(self, piece: Piece) -> _Loan:
        """While somebody tries to fetch `piece`."""
        return _Loan(self, piece)

    def wake(self) -> None:
        """Whoever waits should look again."""
        self._changed.set()
        self._changed = trio.Event()

    def _banned_or_done(self, sender: Sender) -> bool:
        mine = any(self._waiting.get(section) for section in sender.holds)
        return sender.peer_id in self._banned or not (mine or self._lent)

    def _next(self, sender: Sender) -> deque[Piece] | None:
        return next((queue for section, queue in self._waiting.items() if queue and section in sender.holds), None)


class _Loan:
    """Gives its piece back unless it was kept."""

    def __init__(self, queue: _Queue, piece: Piece) -> None:
        self._queue, self._piece, self._kept = queue, piece, False

    def __enter__(self) -> Callable[[], None]:
        self._queue._lent += 1
        return self._keep

    def __exit__(self, *error: object) -> None:
        self._queue._lent -= 1
        if not self._kept:
            self._queue._waiting.setdefault(self._piece.section, deque()).appendleft(self._piece)
        self._queue.wake()

    def _keep(self) -> None:
        self._kept = True


@dataclass(slots=True)
class Report:
    """How far fetching is, in lines for people."""

    what: str
    done: int
    """Bytes that are here."""
    total: int
    _began_with: int = 0
    _began_at: float = 0.0

    def start(self, now: float) -> None:
        self._began_with, self._began_at = self.done, now

    def first_line(self, senders: int) -> str:
        peers = "1 peer" if senders == 1 else f"{senders} peers"
        here = f", {self.done / 1e6:,.0f} MB of it are here" if self.done else ""
        return f"fetching {self.what} from {peers}: {self.total / 1e6:,.1f} MB{here}"

    def line(self, now: float) -> str:
        rate = self._rate(now)
        left = f"{(self.total - self.done) / rate:,.0f} s left" if rate else "waiting"
        return f"{self.what}: {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s, {left}"

    def last_line(self, now: float) -> str:
        return (
            f"fetched {self.what}: {(self.done - self._began_with) / 1e6:,.1f} MB at {self._rate(now) / 1e6:,.1f} MB/s"
        )

    def _rate(self, now: float) -> float:
        return (self.done - self._began_with) / max(now - self._began_at, 1e-3)


def choose_senders(records: Sequence[ServerRecord], blocks: Sequence[int]) -> list[ServerRecord]:
    """Whom to ask for `blocks`: at least `SENDERS` where there are, those first who serve what few others chosen do.

    Who serves a block has its weights for certain; others may have them.
    """
    left, holders = list(records), Counter[int]()
    chosen: list[ServerRecord] = []

    def worth(record: ServerRecord) -> float:
        return sum(1 / (1 + holders[block]) for block in blocks if block in record.blocks)

    def is_needed(record: ServerRecord) -> bool:
        return any(block in record.blocks and not holders[block] for block in blocks)

    while pool := [*filter(is_needed, left)] or (left if len(chosen) < SENDERS else []):
        best = max(pool, key=worth)
        left.remove(best)
        chosen.append(best)
        holders.update(block for block in blocks if block in best.blocks)
    return chosen


def _by_weight(
    said: Mapping[bytes, Sequence[Sender]], section: int, voucher: Voucher
) -> list[tuple[bytes, Sequence[Sender]]]:
    """What to believe, best first: what most say. A seal is checked afterwards, and leaves no doubt. Honest peers may
    have other files beside the same blocks (a model card), so there any of the most frequent will do.

    Raises:
        UserError: as many say this as that about a block.
    """
    ranked = sorted(said.items(), key=lambda each: (-len(each[1]), each[0]))
    doubtful = voucher.sections is None and section >= FIRST_BLOCK
    if doubtful and len(ranked) > 1 and len(ranked[0][1]) == len(ranked[1][1]):
        first, second = (" and ".join(f"…{sender.peer_id[-6:]}" for sender in each) for _, each in ranked[:2])
        raise UserError(
            f"{first} and {second} do not agree about {_title(section)}, and nobody else can tell who is right; a "
            "sealed model (petals seal) leaves no such doubt"
        )
    return ranked


def _check_names(section: int, content: Section, opened: Checkpoint | None) -> None:
    """Raise DocumentError unless a section holds just the tensors that the index of `opened` has in it."""
    names = [item.name for item in content.items]
    if section == FILES:
        right = "config.json" in names
    else:
        right = opened is not None and section_names(opened, section) == names
    if not right:
        raise DocumentError(f"{_title(section)} of other content than the index says")


def _title(section: int) -> str:
    if section < FIRST_BLOCK:
        return "configuration and tokenizer" if section == FILES else "embeddings and head"
    return f"block {section - FIRST_BLOCK}"


def _titles(sections: Sequence[int]) -> str:
    if len(sections) == 1:
        return _title(sections[0])
    return f"{len(sections)} blocks ({sections[0] - FIRST_BLOCK} to {sections[-1] - FIRST_BLOCK})"


async def find_model(host: Host, directory: Directory, wanted: str) -> ModelId:
    """The model that `wanted` means in this swarm: its digest, the beginning of one, its name, or nothing if there is
    only one model.

    Raises:
        UserError: nobody serves it, or several models are meant; names them.
    """
    if len(wanted) == 64 and set(wanted) <= set("0123456789abcdef"):
        known = await directory.lookup(ModelId(wanted[:12], wanted))
        return ModelId(_name_of(known, wanted), wanted)
    models = [status.model for status in await SwarmObserver(host, directory).look()]
    meant = [
        model
        for model in models
        if wanted in ("", model.name) or (len(wanted) >= 8 and model.digest.startswith(wanted))
    ]
    if len(meant) == 1:
        return meant[0]
    said = ", ".join(f"{model.name} (swarm:{model.digest[:12]})" for model in meant or models)
    if meant:
        raise UserError(f"several models are meant by {wanted or 'swarm:'}; name one of {said}")
    raise UserError(f"nobody in the swarm serves {wanted}; there is {said}")


def _name_of(records: Sequence[ServerRecord], digest: str) -> str:
    names = Counter(record.model.name for record in records if record.model.name.isprintable())
    return names.most_common(1)[0][0] if names else digest[:12]


async def _ask(messages: MessageStream, request: bytes) -> tuple[pb.WeightsPart, bytearray]:
    """One request, and its answer with payload. Raises RemoteError."""
    await messages.write_message(request)
    data = await messages.read_message()
    if data is None:
        raise PeerUnreachable(f"peer …{messages.remote_peer[-6:]} ended the stream", messages.remote_peer)
    reply = parse_reply(data)
    if reply.WhichOneof("kind") == "error":
        error = error_of(reply.error, messages.remote_peer)
        raise error
    return reply.part, await messages.read_payload(reply.part.nbytes)
