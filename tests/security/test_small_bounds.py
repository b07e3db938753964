"""Shares of a relay, of what the library answers, of a terminal; files that others can read."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status

from petals.cli.conversation import on_terminal
from petals.peer.base.config import RelayLimits
from petals.peer.base.identity import create_identity, load_identity
from petals.peer.net.host import MAX_LIBRARY_BYTES, MAX_LIBRARY_STREAMS, open_host
from petals.peer.net.nat import relay as relays
from petals.peer.net.nat.relay import Relay
from petals.peer.net.swarm_key import create_swarm_key, load_swarm_key
from petals.peer.net.wire.addresses import house_of
from petals.protocols.framing import encode_frame, encode_varint
from petals.protocols.stream import MessageStream
from petals.protocols.types import PeerId
from tests.fuzz.loop import played
from tests.transport.conftest import LOOPBACK

IDENTIFY_PUSH = "/ipfs/id/push/1.0.0"


@pytest.mark.parametrize(
    ("ip", "house"),
    [
        ("9.9.9.9", "9.9.9.9"),
        ("2600::1", "2600::/64"),
        ("2600:0:0:0:ffff::1", "2600::/64"),
        ("::ffff:9.9.9.9", "9.9.9.9"),
    ],
)
def test_a_house(ip: str, house: str) -> None:
    assert house_of(ip) == house


async def test_one_address_has_a_share_of_a_relay() -> None:
    """However many names it has; others find room."""
    async with open_host(create_identity().key_pair, LOOPBACK) as host:
        houses: dict[PeerId, str] = {}
        limits = RelayLimits(slots=16)
        relay = Relay(host.libp2p, limits, host.traversal._open_stop, lambda _: True, lambda: host.addrs, houses.get)

        async def reserve(house: str) -> bool:
            caller = create_identity().peer_id
            houses[caller] = house
            request = HopMessage(type=HopMessage.RESERVE).SerializeToString()
            ours, theirs = await played(encode_frame(request), caller)
            await relay.answer(ours, relayed=False)
            answer = await MessageStream(theirs, max_message_bytes=1 << 14).read_message()
            return bool(HopMessage.FromString(answer or b"").status == Status.OK)

        assert [await reserve("9.9.9.9") for _ in range(20)].count(True) == limits.slots // relays.SHARE
        assert [await reserve(f"8.8.8.{index}") for index in range(20)].count(True) == 12
        assert relay.places == limits.slots


async def test_identify_pushes_hold_little() -> None:
    """Half-sent ones, of a mebibyte each, on as many streams as a connection allows: 1 GiB for one peer, before."""
    async with (
        open_host(create_new_key_pair(), LOOPBACK) as host,
        open_host(create_new_key_pair(), replace(LOOPBACK, listen=())) as stranger,
    ):
        await stranger.connect(host.addrs[0])
        taken = 0
        streams: list[Any] = []
        with trio.move_on_after(20):
            for _ in range(MAX_LIBRARY_STREAMS * 4):
                stream = await stranger.open_stream(host.peer_id, IDENTIFY_PUSH)
                streams.append(stream)
                await stream.write(encode_varint(1 << 20))
                with trio.move_on_after(0.5):
                    for _ in range(15):
                        await stream.write(bytes(64 << 10))
                        taken += 64 << 10
                if host._n_library[stranger.peer_id] > MAX_LIBRARY_STREAMS:
                    pytest.fail("too many at once")
                held = host._n_library[stranger.peer_id] * MAX_LIBRARY_BYTES
                assert held <= MAX_LIBRARY_STREAMS * MAX_LIBRARY_BYTES
                if len(streams) >= 8:
                    break
        assert await stranger.ping(host.peer_id) > 0
        with trio.fail_after(20):
            while host._n_library[stranger.peer_id] > 0:  # noqa: ASYNC110 - those with too many bytes are reset
                await trio.sleep(0.01)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_key_that_others_can_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    create_identity(tmp_path / "peer.key")
    create_swarm_key(tmp_path / "swarm.key")
    with caplog.at_level(logging.WARNING):
        load_identity(tmp_path / "peer.key")
        load_swarm_key(tmp_path / "swarm.key")
        assert not caplog.records
        for name, mode in (("peer.key", 0o640), ("swarm.key", 0o604)):
            (tmp_path / name).chmod(mode)
        load_identity(tmp_path / "peer.key")
        load_swarm_key(tmp_path / "swarm.key")
    said = [record.getMessage() for record in caplog.records]
    assert [name in each and "chmod 600" in each for name, each in zip(("peer.key", "swarm.key"), said, strict=True)]


def test_a_terminal_obeys_no_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "a\x1b]0;title\x07\x1b[2J\x9b31mb\r\n\tc\x08"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert on_terminal(evil) == "a]0;title[2J31mb\n\tc"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert on_terminal(evil) == evil, "a file gets what was generated"
