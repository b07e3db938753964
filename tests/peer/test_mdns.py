"""What neighbours tell each other by multicast DNS. The multicast itself: tests/nat."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petals.peer.membership.mdns import MAX_ADDRS, read_text, swarm_tag, write_text

ADDR = "/ip4/192.168.1.2/tcp/4001/p2p/12D3KooWGzxzKZYveHXtpG6AsrUJBcWxHBFS2HsEoGTxrMLvKXtf"


def test_addresses_go_through_for_the_same_swarm_only() -> None:
    text = write_text([ADDR, ADDR.replace("4001", "4002")], swarm_tag("ours", b"key"))
    assert read_text(text, swarm_tag("ours", b"key")) == (ADDR, ADDR.replace("4001", "4002"))
    for name, key in (("theirs", b"key"), ("ours", b""), ("ours", b"other"), ("", b"")):
        assert read_text(text, swarm_tag(name, key)) == ()


def test_a_tag_tells_neither_name_nor_key() -> None:
    assert "ours" not in swarm_tag("ours", b"key")
    assert swarm_tag("a", b"b") != swarm_tag("b", b"a") != swarm_tag("ab")


def test_long_lists_are_cut() -> None:
    assert len(read_text(write_text([ADDR] * 100, swarm_tag("")), swarm_tag(""))) == MAX_ADDRS


@given(text=st.binary(max_size=300))
def test_any_text_is_read_without_an_error(text: bytes) -> None:
    tag = swarm_tag("")
    assert all(isinstance(addr, str) for addr in read_text(write_text([ADDR], tag) + text, tag))
    assert read_text(text, tag) == () or tag.encode() in text
