"""A checkpoint's documents and pieces, from peer to peer: what may be asked and answered. Does no I/O."""

from __future__ import annotations

import re
from typing import Literal

from google.protobuf.message import DecodeError

from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import RemoteProtocolError

WEIGHTS_V1 = "/petals/weights/1.0.0"

MAX_REQUEST_BYTES = 1 << 10
MAX_REPLY_BYTES = 8 << 10
MAX_PART_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 16 << 20
MAX_DOCUMENTS = 4 + 4096
SHA256_BYTES = 32


def document_request(digest: str, document: int, offset: int = 0, *, hash_only: bool = False) -> bytes:
    """Asks for a document from `offset` on."""
    asked = pb.DocumentRequest(document=document, offset=offset, hash_only=hash_only)
    return pb.WeightsRequest(model_digest=digest, document=asked).SerializeToString()


def piece_request(digest: str, section: int, sha256: bytes) -> bytes:
    """Asks for one piece by its hash."""
    return pb.WeightsRequest(
        model_digest=digest, piece=pb.PieceRequest(section=section, sha256=sha256)
    ).SerializeToString()


def parse_request(data: bytes) -> tuple[pb.WeightsRequest, Literal["document", "piece"]]:
    """A request and its kind.

    Raises:
        RemoteProtocolError: it does not decode, or asks for what can not be.
    """
    try:
        request = pb.WeightsRequest.FromString(data)
    except DecodeError:
        raise RemoteProtocolError("a message that does not decode") from None
    kind = request.WhichOneof("kind")
    if kind is None:
        raise RemoteProtocolError("a request of no known kind")
    if not re.fullmatch("[0-9a-f]{64}", request.model_digest):
        raise RemoteProtocolError("a model digest that is none")
    number = request.document.document if kind == "document" else request.piece.section
    if number >= MAX_DOCUMENTS:
        raise RemoteProtocolError(f"document {number}, there are at most {MAX_DOCUMENTS}")
    if kind == "piece" and len(request.piece.sha256) != SHA256_BYTES:
        raise RemoteProtocolError(f"a hash of {len(request.piece.sha256)} bytes")
    return request, kind


def document_part(document: bytes, sha256: bytes, asked: pb.DocumentRequest) -> tuple[pb.WeightsReply, memoryview]:
    """The answer to `asked`, and its payload.

    Raises:
        RemoteProtocolError: an offset behind the end.
    """
    if asked.offset > len(document):
        raise RemoteProtocolError(f"offset {asked.offset} in a document of {len(document)} bytes")
    payload = memoryview(document)[asked.offset : asked.offset + (0 if asked.hash_only else MAX_PART_BYTES)]
    part = pb.WeightsPart(nbytes=len(payload), total=len(document), sha256=sha256)
    return pb.WeightsReply(part=part), payload


def parse_reply(data: bytes) -> pb.WeightsReply:
    """A reply whose numbers may be believed.

    Raises:
        RemoteProtocolError: it does not decode, or announces more than may be.
    """
    try:
        reply = pb.WeightsReply.FromString(data)
    except DecodeError:
        raise RemoteProtocolError("a message that does not decode") from None
    if reply.WhichOneof("kind") is None:
        raise RemoteProtocolError("a reply of no known kind")
    part = reply.part
    if part.nbytes > MAX_PART_BYTES or part.total > MAX_DOCUMENT_BYTES or len(part.sha256) not in (0, SHA256_BYTES):
        raise RemoteProtocolError(f"a part of {part.nbytes} bytes of a document of {part.total}")
    return reply
