"""The names that Petals' users know: `from_pretrained` over a swarm, for every head and family.

A model finds its swarm through `initial_peers`, or through a peer that is open already. Models that name the same
initial peers share one peer in a background thread, which ends with the program.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import trio
from transformers import PretrainedConfig

from petals.models.causal_lm import GenerationMixin
from petals.models.checkpoint import open_checkpoint
from petals.models.distributed import DistributedMixin, Head
from petals.models.speculative import SpeculativeMixin
from petals.models.tuning import LoraSettings, Tuning, TuningMode
from petals.peer.client.model_client import ClientOptions
from petals.peer.config import PeerConfig, Timeouts
from petals.peer.node import Peer
from petals.peer.sync import SyncPeer
from petals.protocols.errors import UserError
from petals.protocols.tensors import FLOATS_BY_NAME

INITIAL_PEERS = "PETALS_INITIAL_PEERS"
"""Environment variable: multiaddrs separated by spaces or commas, for programs that name none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig(ClientOptions):
    """All that `from_pretrained` may be told about the swarm, under Petals' names."""

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

    def peer_config(self) -> PeerConfig:
        """The peer that joins this swarm.

        Raises:
            UserError: nobody is named to join through.
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


class _SharedPeers:
    """Background peers by what they were opened with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._peers: dict[PeerConfig, SyncPeer] = {}

    def open(self, config: PeerConfig) -> SyncPeer:
        with self._lock:
            if config not in self._peers:
                self._peers[config] = SyncPeer(config).__enter__()
                atexit.register(self._close, config)
            return self._peers[config]

    def _close(self, config: PeerConfig) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._peers.pop(config).__exit__(None, None, None)


_shared = _SharedPeers()


class _HeadType(type):
    """`isinstance(model, DistributedBloomForCausalLM)`: models are built from the family's own class when opened."""

    head: Head
    model_type: str | None

    def __instancecheck__(cls, instance: object) -> bool:
        return (
            isinstance(instance, DistributedMixin)
            and instance.head_kind == cls.head
            and cls.model_type in (None, instance.config.model_type)  # type: ignore[attr-defined]
        )


class AutoDistributedModel(metaclass=_HeadType):
    """The decoder without head, over the blocks of a swarm; `outputs.last_hidden_state`."""

    head: ClassVar[Head] = "base"
    model_type: ClassVar[str | None] = None
    mixins: ClassVar[tuple[type, ...]] = ()

    def __init__(self) -> None:
        raise UserError(f"{type(self).__name__} is opened with from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        peer: SyncPeer | Peer | None = None,
        **kwargs: Any,
    ) -> Any:
        """Open a model over a swarm: embeddings and head are loaded here, blocks are never read.

        Args:
            model_name_or_path: hub name, local directory or .gguf file; None: the default model.
            peer: one that is open already (`petals.connect`, `open_peer`), instead of `initial_peers`. An `open_peer`
                one is used from a worker thread; in its own trio thread await `afrom_pretrained`.
            tuning_mode: "ptune", "deep_ptune", "lora" or None; pre_seq_len: length of the trained prompt.
            lora_config: a `LoraSettings` or a `peft.LoraConfig`, for tuning_mode="lora".
            dtype, torch_dtype: of embeddings, head and what travels; "auto" or None: what the servers compute in.
            small_model: drafts for `AutoDistributedSpeculativeModel`, a `transformers` model with the same vocabulary.
            client_config: a `ClientConfig`; its fields may also be given one by one (`initial_peers`,
                `active_adapter`, `local_blocks`, `allowed_servers`, `blocked_servers`, `max_retries`, ...).
            Anything else changes an entry of the model's configuration (`num_labels=2`).
        Raises:
            MissingBlocks: names the blocks nobody holds. UserError, ModelError: an argument that cannot be.
        """
        request = _Request.of(kwargs)
        if isinstance(peer, Peer):
            return peer.portal.run(partial(cls._open, peer, model_name_or_path, request))
        opened = peer or _shared.open(request.client.peer_config())
        return opened.peer.portal.run(partial(cls._open, opened.peer, model_name_or_path, request))

    @classmethod
    async def afrom_pretrained(
        cls, model_name_or_path: str | os.PathLike[str] | None = None, *, peer: Peer, **kwargs: Any
    ) -> Any:
        """`from_pretrained` for trio programs."""
        return await cls._open(peer, model_name_or_path, _Request.of(kwargs))

    @classmethod
    async def _open(cls, peer: Peer, name: str | os.PathLike[str] | None, request: _Request) -> Any:
        named = None if name is None else os.fspath(name)
        checkpoint = await peer.checkpoint(named, revision=request.revision, token=request.token)
        model_type = checkpoint.config.model_type
        if cls.model_type not in (None, model_type):
            raise UserError(
                f"{named or 'the default model'} is a {model_type}, not a {cls.model_type}: open it with "
                f"{cls.__mro__[1].__name__}"
            )
        client = await peer.client_for(checkpoint)
        await client.ready(request.client)
        return await trio.to_thread.run_sync(
            partial(
                client.load_model,
                cls.head,
                options=request.client,
                tuning=request.tuning,
                dtype=request.dtype,
                mixins=cls.mixins,
                **request.settings,
            )
        )


class AutoDistributedModelForCausalLM(AutoDistributedModel):
    """A language model over the blocks of a swarm; `generate`, `outputs.logits`."""

    head = "causal_lm"
    mixins = (GenerationMixin,)


class AutoDistributedSpeculativeModel(AutoDistributedModelForCausalLM):
    """A language model over the blocks of a swarm whose greedy decoding is drafted by a small local model."""

    mixins = (SpeculativeMixin,)

    @classmethod
    async def _open(cls, peer: Peer, name: str | os.PathLike[str] | None, request: _Request) -> Any:
        if request.small_model is None:
            raise UserError("speculative decoding needs small_model=..., a local model with the same vocabulary")
        model = await super()._open(peer, name, request)
        model.use_drafts_of(request.small_model)
        return model


class AutoDistributedModelForSequenceClassification(AutoDistributedModel):
    """A classifier over the blocks of a swarm, with a trainable head `score` at home; `outputs.logits`."""

    head = "sequence_classification"


class AutoDistributedConfig:
    """The configuration of a model, as `transformers` has it; nothing else is loaded, no swarm is asked."""

    model_type: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> PretrainedConfig:
        """Raises CheckpointError for a name that leads nowhere, UserError for another family than the class is of."""
        config = open_checkpoint(model_name_or_path, revision=revision, token=token).config
        if cls.model_type not in (None, config.model_type):
            raise UserError(f"{model_name_or_path} is a {config.model_type}, not a {cls.model_type}")
        return config


@dataclass(frozen=True, slots=True)
class _Request:
    """The keyword arguments of `from_pretrained`, sorted."""

    client: ClientConfig
    tuning: Tuning
    dtype: torch.dtype | None
    revision: str | None
    token: str | None
    small_model: Any
    settings: dict[str, Any]

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> _Request:
        rest = dict(kwargs)
        client = rest.pop("client_config", None) or ClientConfig()
        known = {field.name for field in fields(ClientConfig)}
        said = {name: _frozen(name, rest.pop(name)) for name in list(rest) if name in known}
        tuning, dtype = _tuning(rest), _dtype(rest)
        revision, token, small_model = (rest.pop(name, None) for name in ("revision", "token", "small_model"))
        return cls(replace(client, **said), tuning, dtype, revision, token, small_model, rest)


def _frozen(name: str, value: Any) -> Any:
    """What people pass for a collection, as the field has it."""
    if name == "initial_peers":
        return (value,) if isinstance(value, str) else tuple(str(each) for each in value)
    if name == "local_blocks":
        return (value,) if isinstance(value, range) else tuple(value or ())
    if name in ("allowed_servers", "blocked_servers") and isinstance(value, Collection) and not isinstance(value, str):
        return frozenset(str(each) for each in value)
    if name == "blocked_servers" and value is None:
        return frozenset()
    return bool(value) if name == "show_route" else value


def _tuning(rest: dict[str, Any]) -> Tuning:
    mode: TuningMode | None = rest.pop("tuning_mode", None)
    lora = rest.pop("lora_config", None) or LoraSettings()
    if not isinstance(lora, LoraSettings):
        lora = LoraSettings.of_peft(lora)
    return Tuning(mode=mode, pre_seq_len=rest.pop("pre_seq_len", 16), lora=lora)


def _dtype(rest: dict[str, Any]) -> torch.dtype | None:
    chosen = [value for name in ("dtype", "torch_dtype") if (value := rest.pop(name, None)) is not None]
    if not chosen or chosen[0] == "auto":
        return None
    name = str(chosen[0]).removeprefix("torch.")
    if name not in FLOATS_BY_NAME:
        raise UserError(f"unknown dtype {name!r}: choose auto, {', '.join(FLOATS_BY_NAME)}")
    return FLOATS_BY_NAME[name]


_BASES: Sequence[tuple[str, type]] = (
    ("Config", AutoDistributedConfig),
    ("Model", AutoDistributedModel),
    ("ForCausalLM", AutoDistributedModelForCausalLM),
    ("ForSequenceClassification", AutoDistributedModelForSequenceClassification),
    ("ForSpeculativeGeneration", AutoDistributedSpeculativeModel),
)
FAMILIES = {"Bloom": "bloom", "Llama": "llama", "Falcon": "falcon", "Mixtral": "mixtral"}
"""Families with classes of their own in Petals, by the name in them; every other one opens with the Auto classes."""


def _family_class(family: str, suffix: str, base: type) -> type:
    """`DistributedBloomForCausalLM` and its like: the Auto class that accepts one family only."""
    members = {"model_type": FAMILIES[family], "__doc__": base.__doc__, "__module__": __name__}
    return type(base)(f"Distributed{family}{suffix}", (base,), members)


globals().update(
    {
        family_class.__name__: family_class
        for family in FAMILIES
        for suffix, base in _BASES
        for family_class in [_family_class(family, suffix, base)]
    }
)
