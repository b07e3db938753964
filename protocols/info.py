"""Who are you, and what do you serve? One request, one answer, one stream."""

from __future__ import annotations

INFO_V1 = "/petals/info/1.0.0"

MAX_REQUEST_BYTES = 8 << 10
"""Room for a complaint (at most 4 KiB)."""
MAX_REPLY_BYTES = 288 << 10
"""Room for the signed records (at most 16 KiB each) of 16 models, and eight complaints."""
