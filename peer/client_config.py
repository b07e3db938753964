"""What `from_pretrained` takes about the swarm, under Petals' names, and which of Petals' settings have no effect."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from petals.peer.base.config import PeerConfig, Timeouts
from petals.peer.base.config_checks import NOT_NEGATIVE, POSITIVE, check_fields
from petals.peer.client.model_client import ClientOptions
from petals.protocols.errors import UserError

INITIAL_PEERS = "PETALS_INITIAL_PEERS"
"""Environment variable: multiaddrs separated by spaces or commas, for programs that name none."""
MAX_RETRIES = "PETALS_MAX_RETRIES"
"""Environment variable: the default of `max_retries`."""

WITHOUT_EFFECT: Mapping[str, str] = {
    "dht_prefix": "a swarm is named by the digest of its checkpoint",
    "daemon_startup_timeout": "there is no daemon",
    "min_backoff": "another server is asked at once, and when there is none the swarm is watched for one",
    "max_backoff": "another server is asked at once, and when there is none the swarm is watched for one",
    "ban_timeout": "how long a server is avoided depends on what it did",
    "max_pinged": "servers announce the round trips that they measure",
    "ping_timeout": "servers announce the round trips that they measure",
    "use_chunked_forward": "a float16 head is computed in float32 without copies where that is faster",
    "chunked_forward_step": "a float16 head is computed in float32 without copies where that is faster",
}
"""Fields that Petals had and that set nothing here; a value other than the default gets a warning with the reason."""


def _retries() -> float:
    said = os.environ.get(MAX_RETRIES)
    if not said:
        return 10
    if not said.isdecimal():
        raise UserError(f"{MAX_RETRIES} takes a number of retries, not {said!r}")
    return int(said)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig(ClientOptions):
    """All that `from_pretrained` may be told about the swarm, under Petals' names. Lists are taken for collections."""

    max_retries: float | None = field(default_factory=_retries)  # type: ignore[assignment]  # None becomes infinity
    """Failures in a row that one step, or one span of a batch, may survive; None: any number, as Petals had it; the
    default is 10, or $PETALS_MAX_RETRIES."""
    initial_peers: tuple[str, ...] = ()
    """Multiaddrs of peers to join the swarm through; empty: those of $PETALS_INITIAL_PEERS."""
    swarm_key: Path | str | None = None
    """The key file of a private swarm."""
    invitation: str | None = field(default=None, repr=False)
    """A token of `petals invite`; `initial_peers` may be in it."""
    identity: Path | str | None = None
    """The key file that gives this peer its name, made on first use; None: another name each time. Invitations and
    lists are about names."""
    connect_timeout: float = 5.0
    """Seconds for one dial."""
    update_period: float = 15.0
    """Seconds between looks at who serves what."""
    tuning_mode: str | None = None
    """"ptune", "deep_ptune", "lora" or None, as of `from_pretrained`."""
    pre_seq_len: int | None = None
    """Length of the trained prompt; None: 16."""
    dht_prefix: str | None = None
    daemon_startup_timeout: float = 60
    min_backoff: float = 1
    max_backoff: float = 60
    ban_timeout: float = 15
    max_pinged: int = 3
    ping_timeout: float = 2
    use_chunked_forward: bool | str = "auto"
    chunked_forward_step: int = 16384

    def __post_init__(self) -> None:
        for name in ("initial_peers", "local_blocks", "allowed_servers", "blocked_servers", "show_route"):
            object.__setattr__(self, name, _normalised(name, getattr(self, name)))
        if self.max_retries is None:
            object.__setattr__(self, "max_retries", math.inf)
        for each in fields(self):
            if each.name in WITHOUT_EFFECT and getattr(self, each.name) != each.default:
                warnings.warn(f"{each.name} has no effect: {WITHOUT_EFFECT[each.name]}", UserWarning, stacklevel=3)
        ClientOptions.__post_init__(self)
        check_fields(self, {"connect_timeout": POSITIVE, "update_period": POSITIVE, "pre_seq_len": NOT_NEGATIVE})

    def peer_config(self) -> PeerConfig:
        """The peer that joins this swarm.

        Raises:
            UserError: no peer is named to join through.
        """
        peers = self.initial_peers or tuple(os.environ.get(INITIAL_PEERS, "").replace(",", " ").split())
        if not peers and self.invitation is None:
            raise UserError(
                f"which swarm? give initial_peers=[...] (a server prints its address when it starts), peer=..., or "
                f"set {INITIAL_PEERS}"
            )
        return PeerConfig(
            initial_peers=peers,
            swarm_key=None if self.swarm_key is None else Path(self.swarm_key),
            invitation=self.invitation,
            identity=None if self.identity is None else Path(self.identity),
            timeouts=Timeouts(connect_s=self.connect_timeout),
            update_s=self.update_period,
        )


FIELDS = frozenset(each.name for each in fields(ClientConfig))


def _normalised(name: str, value: Any) -> Any:
    """What people pass for a collection, as the field has it."""
    if name == "initial_peers":
        return (value,) if isinstance(value, str) else tuple(str(each) for each in value or ())
    if name == "local_blocks":
        return (value,) if isinstance(value, range) else tuple(value or ())
    if name in ("allowed_servers", "blocked_servers") and isinstance(value, Collection) and not isinstance(value, str):
        return frozenset(str(each) for each in value)
    if name == "blocked_servers" and value is None:
        return frozenset()
    return bool(value) if name == "show_route" else value


HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "low_cpu_mem_usage": (True, False, None),
    "device_map": (None,),
    "use_safetensors": (True, None),
    "trust_remote_code": (False, None),
    "local_files_only": (False, None),
    "force_download": (False, None),
    "resume_download": (True, False, None),
    "offload_folder": (None,),
    "offload_state_dict": (True, False, None),
    "output_loading_info": (False, None),
    "quantization_config": (None,),
    "load_in_8bit": (False, None),
    "load_in_4bit": (False, None),
    "proxies": (None,),
    "subfolder": ("", None),
}
"""Arguments of `transformers`' from_pretrained that ask for nothing with these values, which are taken in silence."""
TOLD: Mapping[str, str] = {
    "cache_dir": "files of the hub are kept where HF_HUB_CACHE says; set it before Python starts",
    "attn_implementation": "each server chooses how its blocks attend",
}
"""Arguments that set nothing here; they get a warning."""
INSTEAD: Mapping[str, str] = {
    "device_map": "embeddings and head are loaded on the CPU; model.to(device) moves them",
    "use_safetensors": "only safetensors are read",
    "trust_remote_code": "no code of a repository is run: see docs/custom-model.md",
    "local_files_only": "set HF_HUB_OFFLINE=1 before Python starts",
    "quantization_config": 'servers choose how their blocks are held; head_quant="int8" is for the head here',
    "load_in_8bit": 'servers choose how their blocks are held; head_quant="int8" is for the head here',
    "load_in_4bit": 'servers choose how their blocks are held; head_quant="int8" is for the head here',
}
"""What to do instead of values that are refused."""


def drop_harmless(arguments: dict[str, Any]) -> None:
    """Take arguments of `transformers`' from_pretrained out that have nothing to do here.

    Raises:
        UserError: one that would have had an effect; says what to do instead.
    """
    for name in [name for name in arguments if name in HARMLESS or name in TOLD]:
        value = arguments.pop(name)
        if name in TOLD:
            if value is not None:
                warnings.warn(f"{name} has no effect: {TOLD[name]}", UserWarning, stacklevel=4)
        elif not any(value is each or (value == each and isinstance(value, str)) for each in HARMLESS[name]):
            raise UserError(f"{name}={value!r} is not taken: {INSTEAD.get(name, 'leave it out')}")
