"""Text from the swarm, token by token: `transformers`' own generation in a worker thread, an async iterator in front."""

from __future__ import annotations
