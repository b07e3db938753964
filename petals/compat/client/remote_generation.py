"""`petals.client.remote_generation` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "RemoteGenerationMixin": "petals.models.client.causal_lm:GenerationMixin",
        "RemotePastKeyValues": "petals.models.client.generation:ChainCache",
    },
)
