"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# Peers that tests start as commands stay on this machine, and do not look around on its network.
os.environ.setdefault("PETALS_LISTEN", "/ip4/127.0.0.1/tcp/0")

# Two busy cores make any deadline a coin toss; pytest-timeout ends what hangs.
settings.register_profile("petals", deadline=None)
settings.load_profile("petals")
