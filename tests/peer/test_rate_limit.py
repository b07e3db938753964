"""How fast strangers may open streams."""

from __future__ import annotations

from petals.peer.base.rate_limit import MAX_KNOWN, MISTAKE, Conduct


def test_a_burst_is_free_and_what_follows_comes_at_the_rate() -> None:
    conduct = Conduct[str](rate=10, burst=5, clock=lambda: 0.0)
    assert [conduct.charge("a") for _ in range(8)] == [0, 0, 0, 0, 0, 0.1, 0.2, 0.3]
    assert conduct.charge("b") == 0


def test_mistakes_cost_and_served_streams_are_given_back() -> None:
    now = 0.0
    conduct = Conduct[str](rate=1, burst=20, clock=lambda: now)
    for _ in range(100):
        assert conduct.charge("busy") == 0
        conduct.charge("busy", -1)
    conduct.charge("bad", MISTAKE)
    assert conduct.charge("bad", MISTAKE) == 2 * MISTAKE - 20
    now += 60
    assert conduct.charge("bad") == 0


def test_a_gift_is_worth_no_more_than_a_rest() -> None:
    conduct = Conduct[str](rate=1, burst=2, clock=lambda: 0.0)
    conduct.charge("a", -100)
    assert [conduct.charge("a") for _ in range(3)] == [0, 0, 1]


def test_many_names_cost_little_memory_and_debtors_are_remembered() -> None:
    now = 0.0
    conduct = Conduct[int](rate=1, burst=1, clock=lambda: now)
    conduct.charge(-1, 1_000_000)
    for who in range(3 * MAX_KNOWN):
        now += 0.01
        conduct.charge(who)
    assert len(conduct._buckets) <= MAX_KNOWN
    assert conduct.charge(-1) > 900_000
