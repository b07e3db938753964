"""Who are you, and what do you serve? One request, one answer, one stream."""

from __future__ import annotations

INFO_V1 = "/petals/info/1.0.0"

MAX_REQUEST_BYTES = 1 << 10
MAX_REPLY_BYTES = 256 << 10
"""Room for the signed records (at most 16 KiB each) of 16 models."""
