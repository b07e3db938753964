"""Fields of the configuration as flags of the command line, for messages about wrong values."""

from __future__ import annotations

from collections.abc import Mapping

from petals.protocols.errors import ConfigError

FLAGS: Mapping[str, str] = {
    "blocks": "--serve",
    "cache_bytes": "--cache_mb",
    "work_bytes": "--work_mb",
    "max_share_bytes_s": "--max_share_mb_s",
    "max_sessions_per_peer": "--max_peer_sessions",
    "prefix_idle_s": "--prefix_idle",
    "favoured": "--favour",
    "allowed": "--allow",
    "blocked": "--block",
    "bytes_per_s": "--relay_mb_s",
    "route_s": "--route_timeout",
    "model": "MODEL",
}
"""Fields whose flag has another name."""
SAME = frozenset(
    {
        "adapters",
        "announce",
        "audit",
        "balance_quality",
        "compression",
        "deterministic",
        "device",
        "dtype",
        "head_quant",
        "identity",
        "initial_peers",
        "invitation",
        "invited_by",
        "listen",
        "local_blocks",
        "max_peer_bytes_s",
        "max_peer_share",
        "max_peer_tokens_s",
        "mean_balance_check_period",
        "num_blocks",
        "priority",
        "public_name",
        "quant_type",
        "relays",
        "revision",
        "share_prefixes",
        "swarm",
        "swarm_key",
        "throughput",
        "token",
        "transport",
        "weights_from",
    }
)
"""Fields whose flag has the same name."""


def in_flags(error: ConfigError) -> str:
    """The message of a ConfigError for somebody who gave flags."""
    if error.field in SAME:
        return f"--{error.field} is {error.value}; allowed: {error.allowed}"
    if error.field in FLAGS:  # perhaps in another unit, hence the field's name as well
        return f"{FLAGS[error.field]}: {error.field} is {error.value}; allowed: {error.allowed}"
    return str(error)
