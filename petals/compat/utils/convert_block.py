"""`petals.utils.convert_block` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import Gone, moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "QuantType": "petals.compat.data:QuantType",
        "convert_block": Gone("petals.models.source.loading.load_span loads and quantises blocks"),
    },
)
