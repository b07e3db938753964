"""The root of all errors that this package raises on purpose. It imports nothing: every folder may import it."""

from __future__ import annotations


class PetalsError(Exception):
    """Root of every error that this package raises on purpose.

    Below it are `SwarmError` (the swarm, the network, the user's settings; petals.protocols.errors) and `ModelError`
    (checkpoints and tensors; petals.models.errors).
    """
