"""Who chooses how dear the verification of a signature is: we do, wherever a stranger shows us a key."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from libp2p.crypto.pb import crypto_pb2
from libp2p.crypto.rsa import create_new_key_pair as new_rsa
from libp2p.crypto.secp256k1 import create_new_key_pair as new_secp256k1
from libp2p.crypto.serialization import deserialize_public_key
from libp2p.peer.envelope import consume_envelope
from libp2p.peer.id import ID
from libp2p.peer.pb import crypto_pb2 as envelope_keys
from libp2p.peer.pb.envelope_pb2 import Envelope

from petals.dht.records import RecordError, open_record
from petals.dht.records_pb2 import SignedRecord
from petals.peer.base.identity import IdentityError, create_identity, load_identity, signer_of, verify
from petals.peer.base.public_key import MAX_KEY_BYTES, limit_library, parse_public_key
from petals.peer.base.rate_limit import MISTAKE
from petals.peer.membership.complaints import ComplaintBook
from petals.peer.membership.record_exchange import COMPLAINT_COSTS, answer_info
from petals.peer.net.host import open_host
from petals.protocols import messages_pb2 as pb
from petals.protocols.admit import open_invitation
from petals.protocols.errors import PeerUnreachable, ProtocolViolation
from petals.protocols.evidence import EvidenceError, open_complaint
from petals.protocols.receipts import ReceiptError, open_receipt
from petals.protocols.stream import MessageStream
from petals.protocols.types import PeerId
from tests.fuzz.loop import played
from tests.fuzz.ways import NOW, evidence_seeds
from tests.transport.conftest import LOOPBACK

A_CHECK_S = 0.002
"""Of one signature by the dearest key that is accepted; 0.1 ms on a quiet machine."""


def protobuf(n: int, e: int) -> bytes:
    der = RSAPublicNumbers(e, n).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return crypto_pb2.PublicKey(key_type=crypto_pb2.KeyType.RSA, data=der).SerializeToString()


@cache
def costly_keys() -> dict[str, bytes]:
    """Public keys whose signatures take long to verify, or whose bytes take long to parse."""
    n = (1 << 4095) + (1 << 2048) + 1
    keys = {
        "exponent as long as the modulus": protobuf(n, n - 2),
        "exponent of 33 bits": protobuf(n, (1 << 32) + 1),
        "8,192 bits": protobuf((1 << 8191) + 1, 65537),
        "1,024 bits": protobuf((1 << 1023) + 1, 65537),
        "e = 3": protobuf(n, 3),
        "secp256k1": new_secp256k1().public_key.serialize(),
        "a megabyte": crypto_pb2.PublicKey(key_type=crypto_pb2.KeyType.RSA, data=bytes(1 << 20)).SerializeToString(),
    }
    good = new_rsa(2048).public_key.serialize()
    return keys | {"padded by unknown fields": good + b"\x7a\x80\x08" + bytes(1024)}


@pytest.mark.parametrize("key", costly_keys().values(), ids=costly_keys())
def test_a_key_that_would_be_dear_is_refused_before_anything_is_verified(key: bytes) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=r"bytes|bits|exponent|neither"):
        parse_public_key(key)
    peer_id = PeerId("Qm" + "a" * 44)
    assert not verify(peer_id, key, b"words", bytes(512))
    assert signer_of(key, b"words", bytes(512)) is None
    assert time.process_time() - began < 10 * A_CHECK_S
    # Everything that is signed goes through one of these two:
    signed = SignedRecord(public_key=key, record=b"", signature=bytes(512)).SerializeToString()
    with pytest.raises(RecordError):
        open_record(signed, now=NOW, verify=verify)
    complaint = pb.SignedComplaint.FromString(evidence_seeds()[0])
    complaint.public_key = key
    with pytest.raises(EvidenceError):
        open_complaint(complaint.SerializeToString(), now=NOW, verify=verify)
    with pytest.raises(ReceiptError):
        open_receipt(pb.Receipt(client_key=key, client_signature=bytes(512)).SerializeToString(), now=0, verify=verify)
    with pytest.raises(ProtocolViolation):
        open_invitation(pb.SignedInvitation(invitation=pb.Invitation(issuer=key).SerializeToString()), signer_of)


def test_what_is_accepted_costs_little() -> None:
    """The dearest key accepted, against Ed25519 and a budget; its name is that of the library."""
    pair = new_rsa(4096)
    key, signature = pair.public_key.serialize(), pair.private_key.sign(b"words")
    assert len(key) < MAX_KEY_BYTES
    peer_id = PeerId(str(ID.from_pubkey(pair.public_key)))
    began = time.process_time()
    assert all(verify(peer_id, key, b"words", signature) for _ in range(50))
    assert time.process_time() - began < 50 * A_CHECK_S
    assert not verify(peer_id, key, b"other words", signature)
    assert not verify(peer_id, key, b"words", b"")


@pytest.mark.parametrize("name", ["exponent as long as the modulus", "8,192 bits", "a megabyte"])
def test_the_library_refuses_them_too(name: str) -> None:
    """The Noise handshake, identify and signed peer records parse keys in py-libp2p."""
    limit_library()
    with pytest.raises(ValueError, match=r"bytes|bits|exponent"):
        deserialize_public_key(costly_keys()[name])
    key = envelope_keys.PublicKey.FromString(costly_keys()[name])
    envelope = Envelope(public_key=key, payload_type=b"\x03\x01", payload=b"", signature=bytes(512))
    with pytest.raises(ValueError, match=r"bytes|bits|exponent"):
        consume_envelope(envelope.SerializeToString(), "libp2p-peer-record")


async def test_a_peer_with_such_a_key_cannot_connect_and_one_with_a_large_rsa_key_can() -> None:
    async with open_host(create_identity().key_pair, LOOPBACK) as host:
        for exponent, lets_in in ((65537, True), ((1 << 32) + 1, False)):
            async with open_host(new_rsa(3072, exponent), replace(LOOPBACK, listen=())) as other:
                if lets_in:
                    await other.connect(host.addrs[0])
                    assert await other.ping(host.peer_id) > 0
                else:
                    with pytest.raises(PeerUnreachable):
                        await other.connect(host.addrs[0])


def test_a_key_file_that_nobody_would_accept_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "odd.key"
    path.write_bytes(new_rsa(2048, 3).private_key.serialize())
    with pytest.raises(IdentityError, match=r"65537"):
        load_identity(path)


async def test_complaints_are_verified_beside_the_loop_and_paid_for() -> None:
    """Each takes up to five signatures. Who sends one that does not hold pays for a mistake."""
    charged: list[int] = []
    where: list[bool] = []

    def slow_verify(*args: bytes) -> bool:
        where.append(trio.lowlevel.in_trio_run())
        return verify(*args)  # type: ignore[arg-type]

    book = ComplaintBook(slow_verify, lambda: NOW)
    good = evidence_seeds()[0]
    forged = pb.SignedComplaint.FromString(good)
    forged.signature = bytes(64)
    for data in (good, forged.SerializeToString()):
        request = pb.InfoRequest(complaints=[data]).SerializeToString()
        stream, far = await played(bytes([len(request) & 127 | 128, len(request) >> 7]) + request)
        await answer_info(lambda _: [], stream, complaints=book, charge=lambda _, streams: charged.append(streams))
        assert await MessageStream(far, max_message_bytes=1 << 16).read_message() is not None
    assert charged == [COMPLAINT_COSTS, COMPLAINT_COSTS, MISTAKE]
    assert where
    assert not any(where), "in the event loop"
    assert len(book.about("")) == 1
