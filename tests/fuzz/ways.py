"""Ways into a swarm and around routers, and what peers say of each other's work and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any

from libp2p.host.autonat.pb.autonat_pb2 import Message as AutonatMessage
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from petals.models.errors import ModelError
from petals.models.source.weights import (
    Index,
    Item,
    Section,
    decode_index,
    decode_section,
    encode_index,
    encode_section,
    open_preimage,
)
from petals.peer.accounting.ledger import Ledger
from petals.peer.accounting.receipts import Accountant
from petals.peer.base.config import RelayLimits
from petals.peer.base.identity import signer_of, verify
from petals.peer.engine.admission import Admission
from petals.peer.membership.complaints import ComplaintBook
from petals.peer.membership.invitation import accept, issue, shown
from petals.peer.membership.mdns import read_text, swarm_tag, write_text
from petals.peer.net.libp2p.swarm import _HANDSHAKE_ERRORS, NOISE_ID, upgrade
from petals.peer.net.nat import autonat, dcutr
from petals.peer.net.nat.relay import Relay
from petals.peer.net.wire import circuit
from petals.peer.net.wire.multistream import proposal
from petals.peer.net.wire.muxer import MuxerConfig
from petals.peer.net.wire.pnet import SwarmCipher, SwarmKey, encode_swarm_key, parse_swarm_key
from petals.protocols import messages_pb2 as pb
from petals.protocols.errors import PeerUnreachable, SwarmError, UserError
from petals.protocols.evidence import Complaint, EvidenceError, SignedAnswer, Statement, open_complaint, sign_complaint
from petals.protocols.framing import encode_frame
from petals.protocols.receipts import (
    CLIENT_DOMAIN,
    SERVER_DOMAIN,
    ReceiptError,
    Work,
    client_of,
    open_receipt,
    open_work,
)
from petals.protocols.stream import ByteStream, MessageStream
from petals.protocols.types import PeerId
from petals.protocols.weights import document_request, parse_reply, parse_request, piece_request
from tests.fuzz.loop import played, the_loop
from tests.fuzz.swarm import _anyone, _stranger, me, node, nothing_hidden
from tests.fuzz.wire import _noise_transport, _Played

NOW = 1e9
DIGEST = "ab" * 32
TAG = swarm_tag("home")
KEY = SwarmKey(bytes(range(32)))
ADDR = Multiaddr(f"/ip4/127.0.0.1/tcp/4001/p2p/{_stranger().peer_id}/p2p-circuit")


def _on_a_stream(data: bytes, *handlers: Callable[[ByteStream], Awaitable[object]]) -> None:
    async def each() -> None:
        for handler in handlers:
            with suppress(SwarmError):
                await handler((await played(data, _stranger().peer_id))[0])

    the_loop().run(each)


# -- private swarms ----------------------------------------------------------------------------------------------------


def swarm_key(data: bytes) -> None:
    """The file; the first bytes of a stranger at the door of a private swarm, and of somebody who has its key."""
    with suppress(UserError):
        assert len(parse_swarm_key(data).secret) == 32

    cipher = SwarmCipher(KEY, bytes(24))

    async def shake(said: bytes) -> None:
        raw: Any = _Played(said)
        with suppress(*_HANDSHAKE_ERRORS):
            await upgrade(
                raw, _noise_transport()[1], expected=None, is_client=False, on_stream=lambda _: None,
                config=MuxerConfig(), swarm_key=KEY,
            )  # fmt: skip

    the_loop().run(partial(shake, data))
    the_loop().run(partial(shake, cipher.nonce + cipher.seal(data)))


def swarm_key_seeds() -> list[bytes]:
    """A key file, and a nonce with something behind it; what is said under the key."""
    return [encode_swarm_key(KEY), bytes(24) + b"\x13/multistream/1.0.0\n", proposal(NOISE_ID) + b"\0\x20" + bytes(32)]


@cache
def _token() -> str:
    return issue(me(), expires_at=NOW + 3600, uses=2, model_digest=DIGEST, addrs=(str(ADDR),), swarm_key=KEY)


def invitations(data: bytes) -> None:
    """The line that people pass on; and what is shown to a server."""
    with suppress(UserError):
        token = accept(data.decode("utf-8", "replace"), peer_id=_stranger().peer_id, now=NOW)
        assert token.invitation.expires_at > NOW
    admission = Admission(me().peer_id, DIGEST, invited_by=frozenset(), verify=signer_of, clock=lambda: NOW)
    _on_a_stream(data, admission.answer)
    assert len(admission._bound) <= 1


def invitations_seeds() -> list[bytes]:
    """A token, and its bearer's question."""
    token = accept(_token(), peer_id=None, now=NOW)
    asked = shown(token, me().peer_id, _stranger().peer_id)
    return [_token().encode(), encode_frame(asked.SerializeToString())]


def lan(data: bytes) -> None:
    """TXT entries of anybody in the local network."""
    addrs = read_text(data, TAG)
    assert len(addrs) <= 16
    assert all(len(addr) < 256 * 4 for addr in addrs)


def lan_seeds() -> list[bytes]:
    """As we write them."""
    return [write_text(["/ip4/192.168.1.2/tcp/4001/p2p/" + me().peer_id] * 3, TAG)]


# -- around routers ----------------------------------------------------------------------------------------------------


@cache
def _relay() -> Relay:
    async def nobody(peer_id: PeerId) -> ByteStream:
        raise PeerUnreachable("it is gone", peer_id)

    host, _ = node()
    return Relay(host.libp2p, RelayLimits(slots=4), nobody, lambda _: True, lambda: (str(ADDR),))


@nothing_hidden()
def relayed(data: bytes) -> None:
    """A question to us as a relay; a relay's answers and calls to us."""
    relay = _relay()
    _on_a_stream(
        data,
        partial(relay.answer, relayed=False),
        circuit.reserve,
        lambda stream: circuit.connect(stream, ID.from_base58(me().peer_id), ADDR),
        lambda stream: circuit.accept(stream, ADDR),
        lambda stream: circuit.announce(stream, ID.from_base58(me().peer_id), circuit.CircuitLimit(1, 1)),
    )
    assert relay.places <= 4
    assert relay.circuits == 0


def relayed_seeds() -> list[bytes]:
    """One of each."""
    called = HopMessage(type=HopMessage.CONNECT)
    called.peer.id = ID.from_base58(_stranger().peer_id).to_bytes()
    placed = HopMessage(type=HopMessage.STATUS, status=Status.OK)
    placed.reservation.expire = int(NOW)
    placed.reservation.addrs.append(ADDR.to_bytes())
    placed.limit.duration, placed.limit.data = 60, 1 << 20
    call = StopMessage(type=StopMessage.CONNECT)
    call.peer.id, call.limit.data = called.peer.id, 1 << 20
    taken = StopMessage(type=StopMessage.STATUS, status=Status.OK)
    said = (HopMessage(type=HopMessage.RESERVE), called, placed, call, taken)
    return [encode_frame(message.SerializeToString()) for message in said]


@nothing_hidden()
def punching(data: bytes) -> None:
    """Dial-backs and hole punching, both ends of each."""
    seen = (f"/ip4/127.0.0.1/tcp/4001/p2p/{me().peer_id}",)

    def messages(stream: ByteStream) -> MessageStream:
        return MessageStream(stream, max_message_bytes=dcutr.MAX_MESSAGE_BYTES)

    _on_a_stream(
        data,
        lambda stream: autonat.ask(stream, me().peer_id, seen),
        lambda stream: autonat.read_question(messages(stream)),
        lambda stream: dcutr.begin(messages(stream), seen),
        lambda stream: dcutr.follow(messages(stream), seen),
    )


def punching_seeds() -> list[bytes]:
    """One of each."""
    question = AutonatMessage(type=AutonatMessage.MessageType.DIAL)
    question.dial.peer.id = ID.from_base58(_stranger().peer_id).to_bytes()
    question.dial.peer.addrs.append(Multiaddr("/ip4/1.2.3.4/tcp/4001").to_bytes())
    answer = AutonatMessage(type=AutonatMessage.MessageType.DIAL_RESPONSE)
    answer.dialResponse.status = AutonatMessage.ResponseStatus.OK
    where = HolePunch(type=HolePunch.CONNECT, ObsAddrs=[Multiaddr("/ip4/1.2.3.4/tcp/4001").to_bytes()])
    now = HolePunch(type=HolePunch.SYNC)
    both = encode_frame(where.SerializeToString()) + encode_frame(now.SerializeToString())
    return [encode_frame(question.SerializeToString()), encode_frame(answer.SerializeToString()), both]


# -- what was done -----------------------------------------------------------------------------------------------------


def evidence(data: bytes) -> None:
    """A complaint, with signatures that are looked at and without."""
    for check in (verify, _anyone):
        with suppress(EvidenceError):
            complaint = open_complaint(data, now=NOW, verify=check)
            assert complaint.expires_at > NOW
        book = ComplaintBook(check, lambda: NOW)
        the_loop().run(partial(book.hear, [data, data]))
        assert len(book.about(DIGEST)) <= 1


def evidence_seeds() -> list[bytes]:
    """About an answer that another holder gave differently."""

    def answer(peer: Any, output: bytes) -> SignedAnswer:
        said = Statement(
            session_id=bytes(16), step_id=1, model_digest=DIGEST, blocks=range(4), adapter="", dtype="float32",
            quant_type="none", inputs=bytes(32), output=output,
        )  # fmt: skip
        return SignedAnswer(
            peer_id=peer.peer_id, public_key=peer.public_key, statement=said, signature=peer.sign(said.to_bytes())
        )

    complaint = Complaint(
        accuser=me().peer_id, answer=answer(_stranger(), bytes(32)), others=(answer(me(), bytes([1]) * 32),),
        error=1.0, tolerance=0.1, issued_at=NOW - 1, expires_at=NOW + 60,
    )  # fmt: skip
    return [sign_complaint(complaint, me().sign, me().public_key)]


def receipts(data: bytes) -> None:
    """A receipt at rest, and a server that wants one signed."""
    for check in (verify, _anyone):
        with suppress(ReceiptError):
            assert open_receipt(data, now=NOW, verify=check).block_tokens > 0
    with suppress(ReceiptError):
        open_work(data, now=NOW)
    with suppress(ReceiptError):
        client_of(data)
    host, _ = node()
    ledger = Ledger(me().peer_id, lambda: NOW)
    accountant = Accountant(host, me(), ledger, lambda: None, lambda: True, None)
    _on_a_stream(data, accountant.answer)
    assert ledger.receipts == 0, "we have counted no work, so there is nothing to sign"


def receipts_seeds() -> list[bytes]:
    """Signed by both; the question for it; the work alone."""
    work = Work(
        server=_stranger().peer_id, client=me().peer_id, receipt_id=bytes(16), model_digest=DIGEST, blocks=range(4),
        steps=3, block_tokens=12, recent_block_tokens=12, started_at=NOW - 9, ended_at=NOW - 1,
    ).encode()  # fmt: skip
    receipt = pb.Receipt(
        work=work,
        client_key=me().public_key,
        client_signature=me().sign(CLIENT_DOMAIN + work),
        server_key=_stranger().public_key,
        server_signature=_stranger().sign(SERVER_DOMAIN + work),
    )
    asked = pb.ReceiptRequest(
        work=work, public_key=_stranger().public_key, signature=receipt.server_signature, wants_references=True
    )
    return [receipt.SerializeToString(), encode_frame(asked.SerializeToString()), work]


# -- weights -----------------------------------------------------------------------------------------------------------


def weights(data: bytes) -> None:
    """Questions, answers, and the documents that they carry."""
    for parse in (parse_request, parse_reply):
        with suppress(SwarmError):
            parse(data)
    with suppress(ModelError):
        decode_index(data)
    with suppress(ModelError):
        section = decode_section(0, data)
        assert section.nbytes >= 0
    with suppress(ModelError):
        voucher = open_preimage(hashlib.sha256(data).hexdigest(), data)
        voucher.check_config({"model_type": "llama"})
        voucher.check_section(0, data)
        voucher.check_names(0, ["w"])


def weights_seeds() -> list[bytes]:
    """One of each."""
    sha256 = hashlib.sha256(b"").hexdigest()
    digest = hashlib.sha256(b"x").digest()
    item = Item("model.layers.0.w", "F32", (2, 2), 16, (digest,))
    return [
        document_request(DIGEST, 3),
        piece_request(DIGEST, 1, digest),
        pb.WeightsReply(part=pb.WeightsPart(nbytes=1, total=2, sha256=digest)).SerializeToString(),
        json.dumps({"config": {"model_type": "llama"}, "weights": [[0, "w", sha256]]}).encode(),
        json.dumps({"sections": [sha256, sha256], "config": sha256}).encode(),
        encode_section(Section((item, item))),
        encode_index(Index(("model.layers.0.w",), "apache-2.0")),
        b"hub:model@commit",
    ]
