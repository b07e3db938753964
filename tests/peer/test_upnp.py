"""Asking a router for a port: the real miniupnpc, and a router on loopback (tests/nat/test_routers.py: a real one)."""

from __future__ import annotations

import pytest

from petals.peer.membership.upnp import LEASE_S, open_port
from tests.nat.igd import Router


def test_a_port_is_opened_renewed_and_given_back() -> None:
    with Router() as router:
        mapping = open_port(4001, router.url)
        assert mapping is not None
        assert mapping.addr == "/ip4/1.2.3.4/tcp/4001"
        assert router.ports == {4001: ("127.0.0.1", 4001)}
        router.ports.clear()  # the router was started anew
        assert mapping.renew()
        assert router.ports == {4001: ("127.0.0.1", 4001)}
        assert router.leases == [LEASE_S, LEASE_S]
        mapping.close()
        assert router.ports == {}


def test_a_port_that_somebody_else_has_is_left_to_it_and_our_own_taken_up_again() -> None:
    with Router(ports={4001: ("192.168.1.7", 4001)}) as router:
        first = open_port(4001, router.url)
        again = open_port(4001, router.url)  # as after a restart
        assert first is not None
        assert again is not None
        assert first.addr == again.addr == "/ip4/1.2.3.4/tcp/4002"
        assert router.ports == {4001: ("192.168.1.7", 4001), 4002: ("127.0.0.1", 4001)}


@pytest.mark.parametrize(
    "trouble",
    [
        {"refuses": 718},  # ConflictInMappingEntry
        {"refuses": 725},  # OnlyPermanentLeasesSupported
        {"refuses": 606},  # not authorized
        {"garbage": True},
        {"outside": "192.168.0.2"},  # behind another router
        {"outside": "100.64.1.1"},  # behind the provider's
        {"outside": ""},
        {"outside": "nonsense"},
        {"outside": "1.2.3.4" * 1000},
        {"ports": {4001 + n: ("192.168.1.7", 80) for n in range(16)}},
    ],
    ids=lambda trouble: str(trouble)[:40],
)
def test_what_a_router_may_say_instead(trouble: dict[str, object]) -> None:
    with Router(**trouble) as router:  # type: ignore[arg-type]
        before = dict(router.ports)
        assert open_port(4001, router.url) is None
        assert router.ports == before


def test_a_router_that_is_gone() -> None:
    with Router() as router:
        mapping = open_port(4001, router.url)
        url = router.url
    assert mapping is not None
    assert not mapping.renew()
    mapping.close()
    assert open_port(4001, url) is None
