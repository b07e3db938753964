"""`petals.client.lm_head` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import Gone, moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "LMHead": Gone("model.lm_head is the head of the family itself"),
        "LMHeadConfig": Gone("from_pretrained(head_quant=...) says how the head is held"),
    },
)
