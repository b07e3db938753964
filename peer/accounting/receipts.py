"""/petals/receipts: has others sign for the work they got, and signs for what we got. Off the path of every step.

A server asks over the connection that is there anyhow, once a client pauses; it never dials anybody for a signature.
Its client signs what it has counted itself, no more. Where priority is by contribution, the client shows on the same
stream what others have signed for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio
from google.protobuf.message import DecodeError

from petals.peer.accounting.ledger import MAX_PEERS, Ledger, open_references, write_ledger
from petals.peer.base.concurrency import apart, gather
from petals.peer.base.identity import Identity, verify
from petals.peer.base.rate_limit import MISTAKE
from petals.peer.net.host import Host
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import RemoteProtocolError, SwarmError
from petals.protocols.receipts import (
    CLIENT_DOMAIN,
    MAX_MESSAGE_BYTES,
    RECEIPTS_V1,
    SERVER_DOMAIN,
    ReceiptError,
    Work,
    open_receipt,
    open_work,
)
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.types import ModelId, PeerId

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between looks at who is to sign."""
QUIET_S = 2.0
"""Who has asked nothing for this long has paused: between two questions, or for good."""
AT_MOST_S = 60.0
"""Who does not pause signs this often."""
EXCHANGE_S = 5.0
"""One stream, all that is said on it."""
AT_ONCE = 8
"""Streams opened at the same time."""
ASK_AGAIN_S = 600.0
"""After a failure; and how long references are believed before they are asked for anew."""
SAVE_S = 60.0


class Accountant:
    """Keeps one peer's ledger signed and saved.

    Args:
        served: what we hold now; None: nothing, so that nobody has to sign.
        wants_references: whether what others say about our clients matters.
        path: where the ledger is kept; None: nowhere.
    """

    def __init__(
        self,
        host: Host,
        identity: Identity,
        ledger: Ledger,
        served: Callable[[], tuple[ModelId, range] | None],
        wants_references: Callable[[], bool],
        path: Path | None,
    ) -> None:
        self.ledger = ledger
        self._host = host
        self._identity = identity
        self._served = served
        self._wants_references = wants_references
        self._path = path
        self._not_before: dict[PeerId, float] = {}
        """Who failed -> when it is asked again, by trio's clock."""
        self._refused: set[PeerId] = set()
        """Who counted nothing of what it was last asked to sign."""
        self._heard_at: dict[PeerId, float] = {}

    async def run(self) -> None:
        """Ask for signatures and save, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._save_often)
            while True:
                await trio.sleep(LOOK_S)
                due = self._due()
                for start in range(0, len(due), AT_ONCE):
                    await gather([partial(self._settle, peer_id) for peer_id in due[start : start + AT_ONCE]])

    def _due(self) -> list[PeerId]:
        due = set(self.ledger.due(quiet_s=QUIET_S, at_most_s=AT_MOST_S))
        due |= {peer_id for peer_id in self.ledger.unsigned if self._is_curious(peer_id)}
        now = trio.current_time()
        self._not_before = {peer_id: until for peer_id, until in self._not_before.items() if until > now}
        return [peer_id for peer_id in due if peer_id not in self._not_before and self._host.is_connected(peer_id)]

    def _is_curious(self, peer_id: PeerId) -> bool:
        """Whether we want to know what others say of a peer."""
        if not self._wants_references():
            return False
        heard_at = self._heard_at.get(peer_id)
        return heard_at is None or trio.current_time() - heard_at >= ASK_AGAIN_S

    # -- as a server -----------------------------------------------------------------------------------------------

    async def _settle(self, peer_id: PeerId) -> None:
        served = self._served()
        work = None if served is None else self.ledger.work_for(peer_id, served[0].digest, served[1])
        if work is None:
            return
        self._not_before[peer_id] = trio.current_time() + ASK_AGAIN_S  # unless it goes well
        with trio.move_on_after(EXCHANGE_S):
            try:
                messages = MessageStream(
                    await self._host.open_stream(peer_id, RECEIPTS_V1), max_message_bytes=MAX_MESSAGE_BYTES
                )
                try:
                    await self._ask(messages, work)
                    await messages.close()
                except BaseException:
                    await messages.reset()
                    raise
            except SwarmError as error:
                if isinstance(error, ReceiptError):
                    self._host.charge(peer_id, MISTAKE)
                log.info("no receipt from …%s: %s", peer_id[-6:], error)
                return
            del self._not_before[peer_id]

    async def _ask(self, messages: MessageStream, work: Work) -> None:
        """Have `work` signed, or what the client has counted of it.

        Raises:
            ReceiptError: the signature is none.
        """
        curious = self._is_curious(work.client)
        for _ in range(2):
            reply = await self._exchange(messages, work, curious)
            if curious:
                curious = False
                await self._hear(work.client, reply)
            if reply.signature:
                self._keep(work, reply)
                return
            amount = min(work.block_tokens, reply.block_tokens)
            if not amount:
                self._note_refusal(work.client)
                return
            recent = max(amount, min(work.recent_block_tokens, reply.recent_block_tokens))
            work = replace(work, block_tokens=amount, recent_block_tokens=recent)

    def _note_refusal(self, client: PeerId) -> None:
        """Once may be an answer that was still under way; twice is a no."""
        if client in self._refused or len(self._refused) >= MAX_PEERS:
            self._refused.discard(client)
            self.ledger.write_off(client)
        else:
            self._refused.add(client)

    async def _exchange(self, messages: MessageStream, work: Work, curious: bool) -> pb.ReceiptReply:
        encoded, identity = work.encode(), self._identity
        request = pb.ReceiptRequest(
            work=encoded,
            public_key=identity.public_key,
            signature=identity.sign(SERVER_DOMAIN + encoded),
            wants_references=curious,
        )
        await messages.write_message(request.SerializeToString())
        data = await messages.read_message()
        try:
            return pb.ReceiptReply.FromString(data or b"")
        except DecodeError:
            raise RemoteProtocolError("a reply that does not decode", work.client) from None

    async def _hear(self, peer_id: PeerId, reply: pb.ReceiptReply) -> None:
        if len(self._heard_at) >= MAX_PEERS:
            self._heard_at.clear()
        self._heard_at[peer_id] = trio.current_time()
        worth = self.ledger.worth_reading(reply.references)
        works, refused = await apart(open_references, peer_id, worth, now=self.ledger.now(), verify=verify)
        self.ledger.rejected += refused
        self._host.charge(peer_id, refused * MISTAKE)
        self.ledger.hear(peer_id, works)

    def _keep(self, work: Work, reply: pb.ReceiptReply) -> None:
        encoded, identity = work.encode(), self._identity
        receipt = pb.Receipt(
            work=encoded,
            server_key=identity.public_key,
            server_signature=identity.sign(SERVER_DOMAIN + encoded),
            client_key=reply.public_key,
            client_signature=reply.signature,
        ).SerializeToString()
        try:
            open_receipt(receipt, now=self.ledger.now(), verify=verify)
        except ReceiptError:
            self.ledger.rejected += 1
            raise
        self.ledger.signed_as_server(work, receipt)
        self._refused.discard(work.client)

    # -- as a client -----------------------------------------------------------------------------------------------

    async def answer(self, stream: ByteStream) -> None:
        """Sign for what a server did for us, as far as we have counted it."""
        messages = MessageStream(stream, max_message_bytes=MAX_MESSAGE_BYTES)
        with trio.move_on_after(EXCHANGE_S):
            for _ in range(2):
                data = await messages.read_message()
                if data is None:
                    return
                try:
                    request = pb.ReceiptRequest.FromString(data)
                except DecodeError:
                    raise RemoteProtocolError("a request that does not decode", stream.remote_peer) from None
                try:
                    reply = self._reply(stream.remote_peer, request)
                except ReceiptError:
                    self._host.charge(stream.remote_peer, MISTAKE)
                    raise
                await messages.write_message(reply.SerializeToString())

    def _reply(self, server: PeerId, request: pb.ReceiptRequest) -> pb.ReceiptReply:
        try:
            reply = self._sign(server, request)
        except ReceiptError:
            self.ledger.rejected += 1
            raise
        if request.wants_references:
            reply.references.extend(self.ledger.references(server))
        return reply

    def _sign(self, server: PeerId, request: pb.ReceiptRequest) -> pb.ReceiptReply:
        work = open_work(request.work, now=self.ledger.now())
        if (work.server, work.client) != (server, self._identity.peer_id):
            raise ReceiptError("receipt: of two others")
        ours = self.ledger.would_sign(work)
        if ours != work:
            return pb.ReceiptReply(block_tokens=ours.block_tokens, recent_block_tokens=ours.recent_block_tokens)
        if not verify(server, request.public_key, SERVER_DOMAIN + request.work, request.signature):
            raise ReceiptError("receipt: not signed by the server it names")
        self.ledger.signed_as_client(work)
        return pb.ReceiptReply(
            public_key=self._identity.public_key, signature=self._identity.sign(CLIENT_DOMAIN + request.work)
        )

    # -- at rest ---------------------------------------------------------------------------------------------------

    async def _save_often(self) -> None:
        while True:
            await trio.sleep(SAVE_S)
            if self._path is not None and self.ledger.changed:
                self.ledger.changed = False
                await trio.to_thread.run_sync(self._write, self._path)

    def save(self) -> None:
        """Write the ledger now, without another word to the loop: for the way out."""
        if self._path is not None and self.ledger.changed:
            self._write(self._path)

    def _write(self, path: Path) -> None:
        try:
            write_ledger(path, self.ledger.dump())
        except OSError as error:
            log.warning("the ledger %s can not be written: %s", path, error.strerror)
