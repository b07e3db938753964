"""The swarm key: published vectors, any slicing, and who gets in."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair

from petals.peer.net.host import HostConfig, open_host
from petals.peer.net.swarm_key import create_swarm_key, load_swarm_key
from petals.peer.net.wire.multistream import Listener
from petals.peer.net.wire.pnet import (
    NONCE_BYTES,
    SwarmCipher,
    SwarmKey,
    encode_swarm_key,
    hsalsa20,
    make_nonce,
    parse_swarm_key,
)
from petals.peer.net.wire.pnet import xsalsa20 as stream_of
from petals.peer.net.wire.pnet_stream import PrivatePipe
from petals.protocols.errors import PeerUnreachable, ProtocolViolation, UserError
from tests.transport.conftest import LOOPBACK, two_hosts
from tests.transport.test_host import until

SHARED = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
FIRST = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
NONCE = bytes.fromhex("69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37")
KEY, OTHER = SwarmKey(bytes(range(32))), SwarmKey(bytes(range(1, 33)))


# -- the cipher ------------------------------------------------------------------------------------------------------


def test_the_vectors_of_nacl() -> None:
    """Bernstein, "Cryptography in NaCl", sections 7 and 8 (the library's tests core1, core2 and stream)."""
    assert hsalsa20(SHARED, bytes(16)) == FIRST
    assert hsalsa20(FIRST, NONCE[:16]).hex() == "dc908dda0b9344a953629b733820778880f3ceb421bb61b91cbd4c3e66256ce4"
    stream = stream_of(SwarmKey(FIRST), NONCE).encrypt(bytes(4 << 20))
    assert stream[:32].hex() == "eea6a7251c1e72916d11c2cb214d3c252539121d8e234e652d651fa4c8cff880"
    assert hashlib.sha256(stream).hexdigest() == "662b9d0e3463029156069b12f918691a98f7dfb2ca0393c96bbfc6b1fbd630a2"


@given(
    messages=st.lists(st.binary(max_size=300), max_size=8),
    cuts=st.lists(st.integers(1, 100), max_size=40),
    nonce=st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES),
)
def test_what_was_said_survives_any_slicing(messages: list[bytes], cuts: list[int], nonce: bytes) -> None:
    near, far = SwarmCipher(KEY, nonce), SwarmCipher(KEY, bytes(NONCE_BYTES))
    wire = bytearray(near.nonce + b"".join(map(near.seal, messages)))
    got = bytearray()
    while wire:
        piece = wire[: cuts.pop() if cuts else len(wire)]
        if wanted := far.nonce_wanted():
            piece = piece[:wanted]
            far.receive_nonce(piece)
        else:
            far.open(memoryview(piece))
            got += piece
        del wire[: len(piece)]
    assert got == b"".join(messages)


@given(random=st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES))
def test_a_nonce_is_no_line_that_a_peer_without_a_key_would_wait_for(random: bytes) -> None:
    nonce = make_nonce(random)
    assert len(nonce) == NONCE_BYTES
    listener = Listener(())
    listener.receive_data(nonce[:4])
    with pytest.raises(ProtocolViolation):
        listener.chosen()


class Narrow:
    """A carrier that takes as much at once as the test says, and the rest when it is waited for."""

    def __init__(self, room: list[int]) -> None:
        self.wire, self._room = bytearray(), room

    def try_send(self, pieces: Sequence[bytes | memoryview]) -> int:
        data = b"".join(pieces)[: self._room.pop() if self._room else None]
        self.wire += data
        return len(data)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.wire += data

    async def receive_into(self, buffer: memoryview) -> int:
        size = min(len(buffer), len(self.wire))
        buffer[:size] = self.wire[:size]
        del self.wire[:size]
        return size

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...


@given(
    messages=st.lists(st.lists(st.binary(max_size=100), min_size=1, max_size=3), max_size=12),
    room=st.lists(st.integers(0, 200), max_size=12),
    take=st.integers(1, 300),
)
def test_what_a_full_carrier_did_not_take_goes_out_in_order_and_once(
    messages: list[list[bytes]], room: list[int], take: int
) -> None:
    async def main() -> bytes:
        carrier = Narrow(room)
        near, far = SwarmCipher(KEY, NONCE), SwarmCipher(KEY, bytes(NONCE_BYTES))
        far.receive_nonce(near.nonce)
        pipe, reader = PrivatePipe(carrier, near), PrivatePipe(carrier, far)
        for pieces in messages:  # as the muxer does: what is left goes first, with what came meanwhile behind it
            data = b"".join(pieces)
            sent = pipe.try_send(pieces)
            if sent < len(data):
                assert pipe.try_send([data[sent:]]) == 0
                await pipe.send_all(data[sent:] + b"and more")
        got, buffer = bytearray(), bytearray(take)
        while received := await reader.receive_into(memoryview(buffer)):
            got += buffer[:received]
        return bytes(got)

    expected = b""
    left = list(room)
    for pieces in messages:
        data = b"".join(pieces)
        fits = left.pop() if left else len(data)
        expected += data + (b"and more" if fits < len(data) else b"")
    assert trio.run(main) == expected


# -- the file --------------------------------------------------------------------------------------------------------


def test_a_key_file_is_made_once_for_its_owner_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    key = create_swarm_key(path)
    assert load_swarm_key(path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == f"/key/swarm/psk/1.0.0/\n/base16/\n{key.secret.hex()}\n".encode()
    with pytest.raises(UserError, match="not overwritten"):
        create_swarm_key(path)
    assert load_swarm_key(path) == key


def test_all_encodings_are_read() -> None:
    header = b"/key/swarm/psk/1.0.0/\n"
    assert parse_swarm_key(encode_swarm_key(KEY)) == KEY
    assert parse_swarm_key(header + b"/base64/\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n") == KEY
    assert parse_swarm_key(header + b"/bin/\n" + KEY.secret) == KEY
    assert parse_swarm_key(encode_swarm_key(KEY).replace(b"\n", b"\r\n")) == KEY


@pytest.mark.parametrize("spoil", [
    lambda data: b"",
    lambda data: data[:-3],
    lambda data: data.replace(b"1.0.0", b"2.0.0"),
    lambda data: data.replace(b"base16", b"base58"),
    lambda data: data.replace(b"base16", b"base64"),
    lambda data: data.replace(b"0a", b"xx"),
    lambda data: data.replace(b"0a", b"\xff\xff"),
    lambda data: data.replace(b"base16", b"bin")[:40],
])  # fmt: skip
def test_what_is_no_key_file_is_the_users_mistake_and_is_not_quoted(spoil, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "swarm.key"
    path.write_bytes(spoil(encode_swarm_key(KEY)))
    with pytest.raises(UserError, match=r"swarm\.key holds no swarm key") as caught:
        load_swarm_key(path)
    assert "0102" not in str(caught.value)


def test_the_key_shows_nowhere() -> None:
    for text in (repr(KEY), repr(HostConfig(swarm_key=KEY)), str(KEY), KEY.fingerprint):
        assert KEY.secret.hex()[:12] not in text
        assert repr(KEY.secret)[2:20] not in text
    assert KEY.fingerprint != OTHER.fingerprint


def test_the_stock_transport_refuses_a_key() -> None:
    with pytest.raises(UserError, match="no private swarms"):
        HostConfig(transport="stock", swarm_key=KEY)


# -- who gets in -----------------------------------------------------------------------------------------------------

PATIENT = replace(LOOPBACK, connect_s=120.0, handshake_s=120.0)
"""Whatever ends within the test's own deadline did so by itself."""


async def test_peers_with_the_same_key_meet() -> None:
    async with two_hosts(replace(PATIENT, swarm_key=KEY)) as (client, server):
        assert await client.ping(server.peer_id) > 0
        assert await server.ping(client.peer_id) > 0


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [(KEY, OTHER, "another swarm key, or none"), (KEY, None, "another swarm key, or none"), (None, KEY, "--swarm_key")],
    ids=["another", "they have none", "we have none"],
)
async def test_strangers_are_told_at_once(
    ours: SwarmKey | None, theirs: SwarmKey | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "petals")
    async with (
        open_host(create_new_key_pair(), replace(PATIENT, swarm_key=theirs)) as server,
        open_host(create_new_key_pair(), replace(PATIENT, swarm_key=ours, listen=())) as client,
    ):
        with trio.fail_after(30), pytest.raises(PeerUnreachable, match=why):
            await client.connect(server.addrs[0])
        assert not client.connected_peers()
        assert not server.connected_peers()

        def refused() -> int:
            return sum("refused" in each.message for each in caplog.records)

        await until(lambda: refused() == (theirs is not None))  # it hangs up first, and notes that then
        # The listener lost one connection, nothing else.
        async with open_host(create_new_key_pair(), replace(PATIENT, swarm_key=theirs, listen=())) as friend:
            await friend.connect(server.addrs[0])
            assert await friend.ping(server.peer_id) > 0
        assert refused() == (theirs is not None)


async def test_a_listener_that_hears_a_byte_of_something_else_hangs_up() -> None:
    async with open_host(create_new_key_pair(), replace(PATIENT, swarm_key=KEY)) as server:
        port = int(server.addrs[0].split("/")[4])
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(bytes(NONCE_BYTES) + stream_of(KEY, bytes(NONCE_BYTES)).encrypt(b"\x14"))
        with trio.fail_after(30):
            heard = b""
            while piece := await stream.receive_some():
                heard += piece
        assert len(heard) == NONCE_BYTES
        await stream.aclose()
