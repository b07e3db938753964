"""Frozen settings, one small class per concern. Times are in seconds, sizes in bytes.

Each class checks its values when it is made, and raises a ConfigError that names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from petals.peer.base.config_checks import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    Within,
    check_addresses,
    check_fields,
    refuse,
)
from petals.protocols.types import PeerId


def quarter_of_memory() -> int:
    """Bytes: a quarter of this machine's memory, at least 1 GiB."""
    return max(1 << 30, psutil.virtual_memory().total // 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long a client waits at each door. All positive."""

    connect_s: float = 5.0
    """One dial, all addresses of a peer together."""
    open_s: float = 15.0
    """Opening a session at one server, queueing for cache room included."""
    step_s: float = 120.0
    """One hop, one step, at most. Worst case: a long prompt on a CPU server. The deadline in force adapts to the hop's
    own measured speed and is usually far below."""
    min_step_s: float = 10.0
    """The adaptive deadline never falls below this: a pause of a busy machine is no failure."""
    training_s: float = 300.0
    """One span's forward or backward."""
    route_s: float = 20.0
    """How long to look for a peer that holds a block nobody seems to hold."""
    reset_s: float = 1.0
    """Saying goodbye on a stream that may be dead."""

    def __post_init__(self) -> None:
        check_fields(self, dict.fromkeys(self.__slots__, POSITIVE))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What a server holds and how much it gives."""

    blocks: range | None = None
    """Which blocks, half-open; None: `num_blocks` of them, chosen where the swarm is weakest, and moved when that
    changes."""
    num_blocks: int | None = None
    """How many to choose; None: as many as fit into free memory."""
    balance_quality: float = 0.95
    """Move when the swarm's strain (placement.py) would fall below this share of what it is; 0: never move."""
    mean_balance_check_period: float = 120.0
    """Seconds between looks at whether moving pays, on average; the pauses are random, so that servers that see the
    same do not run to the same place at once."""
    drain_s: float = 120.0
    """How long a server that moves lets its sessions go on; then they fail over to others, without losing a token."""
    adapters: tuple[Path, ...] = ()
    """Directories of LoRA adapters (PEFT's format, safetensors) to host; a request names one by its directory."""
    cache_bytes: int = 1 << 30
    """KV-cache budget over all sessions."""
    cache_tokens: int | None = None
    """The same budget as room for so many tokens on each block that is served, in place of `cache_bytes`."""
    work_bytes: int = field(default_factory=quarter_of_memory)
    """Memory for requests that are being received, computed and answered, besides the cache: tensors of prompts and
    batches, pushes that wait for their step, what training keeps from forward to backward. One remote peer may hold
    half of it."""
    max_peer_share: float = 1.0
    """The most of the cache one remote peer may hold."""
    max_wait_s: float = 60.0
    """The longest a request may queue for cache room, whatever it offers to wait."""
    max_sessions_per_peer: int = 128
    max_peer_tokens_s: float | None = None
    """Tokens (rows x new ones) per second that one peer may ask; favoured ones may ask more. None: no such limit."""
    max_peer_bytes_s: float | None = None
    """Bytes of tensors per second, in and out, of one peer; favoured ones may have more. None: no such limit."""
    allowed: frozenset[PeerId] | None = None
    """Only these may use the blocks, and whom `invited_by` or the server itself has invited; None: everybody."""
    invited_by: frozenset[PeerId] | None = None
    """Bearers of these peers' invitations may use the blocks, and of the server's own; only they (and `allowed`), if
    it is not None."""
    max_batch_tokens: int = 16384
    """Most tokens (batch x length) of one step, forward or backward."""
    prefill_chunk_tokens: int = 512
    """Tokens (rows x new ones) computed in one go while nobody else decodes; smaller pieces then travel with others'
    decode steps."""
    deterministic: bool = False
    """Compute every step alone, every prompt in pieces of `prefill_chunk_tokens`, and by no product that was chosen by
    measurement, so that answers do not depend, not even by rounding, on who else asks. Servers of one swarm should
    agree on it and on the pieces."""
    prefix_idle_s: float = 600.0
    """How long the cache of an ended session is kept for the next one that begins with the same tokens, where no lease
    needs the room; 0: not at all. `deterministic` servers keep nothing: a prompt in other pieces has other bits."""
    share_prefixes: bool = False
    """Let every client find what any client left. They must trust each other: the names of caches are the clients'."""
    favoured: frozenset[PeerId] = frozenset()
    """Peers whose work goes before others' of the same kind, such as one's own."""
    priority: Literal["fair", "reciprocal"] = "fair"
    """Of work of the same kind, when there is more than can be done at once. fair: every peer has the same share;
    reciprocal: those who serve have a larger one (docs/contribution.md)."""
    max_lora_bytes: int = 64 << 20
    """Most bytes of low-rank updates that a client may send with one session or request; they count as its cache."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype: auto (float32 on a CPU, the checkpoint's own elsewhere), float32, bfloat16 or float16."""
    quant_type: Literal["none", "int8", "nf4"] = "none"
    compression: Literal["none", "float16", "int8"] = "none"
    """How answers travel to those who have not asked for less than all bits."""
    device: str = "auto"
    session_idle_s: float = 1800.0
    """A session that asks nothing for this long is ended."""
    payload_s: float = 120.0
    """A payload that has been announced must have arrived by then."""
    announce_s: float = 30.0
    """How often the record is renewed; it expires after three times this."""
    public_name: str = ""
    throughput: float | None = None
    """Blocks passed per second, decode; None: measure."""
    share_weights: bool | None = None
    """Give the checkpoint to newcomers who ask for it; None: where its licence is known to let anybody pass it on."""
    max_share_bytes_s: float = 20e6
    """The most of it a second, to all of them together."""

    def __post_init__(self) -> None:
        check_fields(self, _SERVE_BOUNDS)
        if self.blocks is not None and (self.blocks.step != 1 or not 0 <= self.blocks.start < self.blocks.stop):
            refuse(self, "blocks", "None, or a range of at least one block, half-open, such as range(0, 12)")
        if self.blocks is not None and self.num_blocks is not None:
            refuse(self, "num_blocks", "None where blocks says which blocks")


_SERVE_BOUNDS: Mapping[str, Within] = {
    "num_blocks": AT_LEAST_1,
    "balance_quality": Within(0, 1, below=True),
    "mean_balance_check_period": POSITIVE,
    "drain_s": NOT_NEGATIVE,
    "cache_bytes": AT_LEAST_1,
    "cache_tokens": AT_LEAST_1,
    "work_bytes": Within(1 << 20),
    "max_peer_share": Within(0, 1, above=True),
    "max_wait_s": NOT_NEGATIVE,
    "max_sessions_per_peer": AT_LEAST_1,
    "max_peer_tokens_s": POSITIVE,
    "max_peer_bytes_s": POSITIVE,
    "max_batch_tokens": AT_LEAST_1,
    "prefill_chunk_tokens": AT_LEAST_1,
    "prefix_idle_s": NOT_NEGATIVE,
    "max_lora_bytes": NOT_NEGATIVE,
    "session_idle_s": POSITIVE,
    "payload_s": POSITIVE,
    "announce_s": POSITIVE,
    "throughput": POSITIVE,
    "max_share_bytes_s": POSITIVE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """What a relay gives to others."""

    slots: int = 128
    """Peers that have a place here."""
    circuits: int = 256
    """Open at once."""
    circuits_per_peer: int = 16
    """Of one calling peer."""
    reservation_s: int = 3600
    bytes_per_s: float = 0.0
    """All circuits together, each direction counted; 0: as much as there is."""
    circuit_s: int = 0
    """How long one circuit may live; 0: as long as it likes."""
    circuit_bytes: int = 0
    """What may pass through one circuit, both ways together; 0: as much as it likes. Go's default is 131,072, which a
    prompt's hidden states fill at once."""

    def __post_init__(self) -> None:
        at_least_1 = dict.fromkeys(("slots", "circuits", "circuits_per_peer", "reservation_s"), AT_LEAST_1)
        check_fields(self, at_least_1 | dict.fromkeys(("bytes_per_s", "circuit_s", "circuit_bytes"), NOT_NEGATIVE))


@dataclass(frozen=True, slots=True, kw_only=True)
class NatConfig:
    """What to do about routers."""

    relays: tuple[str, ...] = ()
    """Full multiaddrs of relays to use when others can not dial us; empty: find some in the directory."""
    relay: RelayLimits | None = None
    """Be a relay for others; None: not."""
    upnp: bool = True
    """Ask the router for a port when others can not dial us."""

    def __post_init__(self) -> None:
        check_fields(self, {})
        check_addresses(self, "relays")


@dataclass(frozen=True, slots=True, kw_only=True)
class LanConfig:
    """Finding peers on the local network (mdns.py)."""

    swarm: str = ""
    """Only peers of a swarm of the same name join each other."""
    search_s: float = 3.0
    """How long to look for somebody before going on alone; 0: do not wait."""
    required: bool = False
    """Whether going on alone makes no sense."""

    def __post_init__(self) -> None:
        check_fields(self, {"search_s": NOT_NEGATIVE})


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """One peer. Roles are chosen by what is set: `serve` makes a server; any peer can ask."""

    model: str | None = None
    """Hub name, local directory, .gguf file, `swarm:` and a digest; None: the default model."""
    weights_from: Literal["auto", "hub", "swarm"] = "auto"
    """Where it comes from; auto: the hub or the disk, and the swarm's servers where the hub can not give it."""
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    serve: ServeConfig | None = None
    identity: Path | None = None
    """Key file, made on first use; None: a new key that lives as long as the process."""
    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce: tuple[str, ...] = ()
    """Multiaddrs to tell others instead of the listening ones (a router's forwarded port)."""
    initial_peers: tuple[str, ...] = ()
    wait_for_initial_peers: bool = False
    """When none of them answers, wait until one does; False: that is an error."""
    nat: NatConfig = field(default_factory=NatConfig)
    lan: LanConfig | None = None
    """Join peers on the local network; None: do not, and do not tell them."""
    invitation: str | None = field(default=None, repr=False)
    """A token (`petals invite`): it may bring initial peers and swarm key along, and is shown to servers."""
    blocked: frozenset[PeerId] = frozenset()
    """Peers whose connections are closed, whoever dials."""
    swarm_key: Path | None = None
    """The file of a private swarm's key (`petals keygen --swarm`): only peers with the same one can connect."""
    transport: Literal["petals", "stock"] = "petals"
    keep_alive_s: float = 10.0
    timeouts: Timeouts = field(default_factory=Timeouts)
    update_s: float = 15.0
    """How often the client's view of the swarm is renewed."""

    def __post_init__(self) -> None:
        check_fields(self, {"keep_alive_s": POSITIVE, "update_s": POSITIVE})
        check_addresses(self, "listen", "announce", "initial_peers")
