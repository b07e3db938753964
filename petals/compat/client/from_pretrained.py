"""`petals.client.from_pretrained` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import Gone, moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "FromPretrainedMixin": Gone("a class of your own: see docs/custom-model.md"),
    },
)
