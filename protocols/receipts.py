"""What a peer signs about the work it did or got, and every check before a receipt is believed. Sans I/O and torch.

A receipt says that a server did so much for a client. Both sign the same bytes, each behind a domain string of its own,
so that neither signature can stand for the other one, or for anything else a key signs. The server's own word about its
work is worth nothing; the client's is worth what the client is worth to whoever reads it (peer/accounting/ledger.py).

Work is counted in block-tokens, by the same rule at both ends, so that the two counts agree to the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import SwarmError
from petals.protocols.types import PeerId

RECEIPTS_V1 = "/petals/receipts/1.0.0"

SERVER_DOMAIN = b"petals/receipt-server/1\n"
CLIENT_DOMAIN = b"petals/receipt-client/1\n"
"""Signed in front, so that no signature for another purpose can be passed off as one."""

MAX_RECEIPT_BYTES = 2 << 10
"""Two RSA signatures and their keys fit."""
MAX_REFERENCES = 16
"""Receipts that a client shows at once."""
MAX_MESSAGE_BYTES = 64 << 10
MAX_BLOCK_TOKENS = 1 << 53
"""Counts stay whole in a float."""
MAX_AGE_S = 14 * 24 * 3600.0
MAX_CLOCK_SKEW_S = 300.0
RECEIPT_ID_BYTES = 16
MAX_TEXT = 200

DECODE_TOKENS = 8
"""New tokens per row up to which each counts whole; of a prompt an eighth of them does. On two CPU cores 1,024 tokens
of a prompt take 3.1 s and a decode step 27.9 ms (docs/performance.md), which is a ratio of nine; on others it is
another one, but both ends must count alike."""
BACKWARD = 3
"""A backward pass costs this many forward passes: one again, and two products for each of its own."""

Sign = Callable[[bytes], bytes]
Verify = Callable[[PeerId, bytes, bytes, bytes], bool]
"""(peer ID, public key, data, signature) -> whether that peer signed it."""


class ReceiptError(SwarmError):
    """A receipt that is not believed."""


def block_tokens(blocks: int, rows: int, tokens: int) -> int:
    """The work of `rows` x `tokens` new tokens through `blocks` blocks."""
    return blocks * rows * (tokens if tokens <= DECODE_TOKENS else max(DECODE_TOKENS, -(-tokens // 8)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one peer did for another since their last receipt. Limits are checked by `open_work`."""

    server: PeerId
    client: PeerId
    receipt_id: bytes
    model_digest: str
    blocks: range
    """What the server holds; a session may have used a part of it."""
    steps: int
    block_tokens: int
    recent_block_tokens: int
    """This and all before it as far as it is not forgotten (peer/accounting/ledger.py), as of `ended_at`."""
    started_at: float
    ended_at: float
    """Unix seconds by the server's clock."""

    def encode(self) -> bytes:
        """The bytes that are signed."""
        return pb.Work(
            server=self.server,
            client=self.client,
            receipt_id=self.receipt_id,
            model_digest=self.model_digest,
            start_block=self.blocks.start,
            end_block=self.blocks.stop,
            steps=self.steps,
            block_tokens=self.block_tokens,
            recent_block_tokens=self.recent_block_tokens,
            started_at=self.started_at,
            ended_at=self.ended_at,
        ).SerializeToString()


def open_work(data: bytes, *, now: float) -> Work:
    """What is said to have been done, every number within its limits. Who says so is not known yet.

    Raises:
        ReceiptError: too large, garbage, a field out of its limits, dated in the future, or too old.
    """
    _check(len(data) <= MAX_RECEIPT_BYTES, "too large")
    try:
        fields = pb.Work.FromString(data)
    except DecodeError:
        raise ReceiptError("receipt: it does not decode") from None
    _check(len(fields.server) <= MAX_TEXT and len(fields.client) <= MAX_TEXT, "peer ID too long")
    _check(fields.server != fields.client, "a peer's word for itself")
    _check(len(fields.receipt_id) == RECEIPT_ID_BYTES, "bad id")
    _check(len(fields.model_digest) == 64 and set(fields.model_digest) <= set("0123456789abcdef"), "bad digest")
    _check(fields.start_block < fields.end_block <= 4096, "bad block range")
    _check(0 < fields.block_tokens <= fields.recent_block_tokens <= MAX_BLOCK_TOKENS, "bad numbers")
    _check(math.isfinite(fields.started_at) and math.isfinite(fields.ended_at), "time that is no number")
    _check(fields.started_at <= fields.ended_at <= now + MAX_CLOCK_SKEW_S, "dated in the future, or backwards")
    _check(now - MAX_AGE_S <= fields.ended_at, "too old")
    return Work(
        server=PeerId(fields.server),
        client=PeerId(fields.client),
        receipt_id=fields.receipt_id,
        model_digest=fields.model_digest,
        blocks=range(fields.start_block, fields.end_block),
        steps=fields.steps,
        block_tokens=fields.block_tokens,
        recent_block_tokens=fields.recent_block_tokens,
        started_at=fields.started_at,
        ended_at=fields.ended_at,
    )


def open_receipt(data: bytes, *, now: float, verify: Verify) -> Work:
    """The work in a receipt that both have signed.

    Raises:
        ReceiptError: as `open_work`, or one of the two has not signed it.
    """
    _check(len(data) <= MAX_RECEIPT_BYTES, "too large")
    try:
        receipt = pb.Receipt.FromString(data)
    except DecodeError:
        raise ReceiptError("receipt: it does not decode") from None
    work = open_work(receipt.work, now=now)
    by_client = verify(work.client, receipt.client_key, CLIENT_DOMAIN + receipt.work, receipt.client_signature)
    _check(by_client, "not signed by the client it names")
    by_server = verify(work.server, receipt.server_key, SERVER_DOMAIN + receipt.work, receipt.server_signature)
    _check(by_server, "not signed by the server it names")
    return work


def client_of(data: bytes) -> PeerId:
    """Who is said to have signed a receipt as the client; nothing is checked.

    Raises:
        ReceiptError: garbage.
    """
    try:
        return PeerId(pb.Work.FromString(pb.Receipt.FromString(data).work).client)
    except DecodeError:
        raise ReceiptError("receipt: it does not decode") from None


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ReceiptError(f"receipt: {otherwise}")
