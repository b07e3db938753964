"""`petals.server.handler` as Petals had it."""

from __future__ import annotations

from petals.compat.moved import Gone, moved

__getattr__, __dir__ = moved(
    __name__,
    {
        "CACHE_TOKENS_AVAILABLE": "petals.compat.data:CACHE_TOKENS_AVAILABLE",
        "TransformerConnectionHandler": Gone("a peer answers by itself: petals peer --serve"),
    },
)
