"""`petals.utils.peft` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "load_peft": "petals.models.blocks.adapters:load_lora",
    },
)
