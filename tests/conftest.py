"""Settings for all tests."""

from __future__ import annotations

from hypothesis import settings

# Two busy cores make any deadline a coin toss; pytest-timeout ends what hangs.
settings.register_profile("petals", deadline=None)
settings.load_profile("petals")
