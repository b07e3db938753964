"""What benchmarks/soak.py calls wrong. It runs beside the tests for three minutes (scripts/test), an hour by hand."""

from __future__ import annotations

from benchmarks import soak


def test_what_must_not_be_is_found() -> None:
    """The judge itself."""
    done = {"tokens": 100, "done": {"start": 2}}
    figures = {"before": (37, 0, 15), "after": (37, 0, 15), "mib_per_minute": 0.2, **done}
    assert soak.judge(figures, growth=1.0) == []
    assert soak.judge({**figures, "after": (38, 0, 16)}, growth=1.0) == [
        "tasks: 38 instead of 37",
        "descriptors: 16 instead of 15",
    ]
    assert soak.judge({**figures, "mib_per_minute": 1.5}, growth=1.0)
    assert soak.judge({**figures, "tokens": 0}, growth=1.0)
    assert soak.judge({**figures, "done": {"start": 1}}, growth=1.0)
    leaking = [(minute / 10, 400 + 5 * minute / 10 + minute % 2) for minute in range(60)]
    assert 4.5 < soak.slope(leaking) < 5.5
    assert abs(soak.slope([(minute, 400 + minute % 2) for minute in range(60)])) < 0.1
