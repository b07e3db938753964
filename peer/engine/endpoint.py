"""All that a server answers about one loaded span."""

from __future__ import annotations

from petals.peer.engine.inference import Sessions
from petals.peer.engine.training import Trainings


class Inbound(Sessions, Trainings):
    """Answers inference sessions, pushes, forward and backward requests; they share leases, quotas and the lane."""
