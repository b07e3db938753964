"""The names that Petals' users know: `from_pretrained` over a swarm, for every head and family.

A model finds its swarm through `initial_peers`, or through a peer that is open already. Models that name the same
initial peers share one peer in a background thread, which ends with the program.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import threading
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import trio
from transformers import PretrainedConfig, PreTrainedModel

from petals.models.client.causal_lm import GenerationMixin
from petals.models.client.chain import BlockChain
from petals.models.client.distributed import DistributedMixin, Head
from petals.models.client.remote_sequential import RemoteSequential as Blocks
from petals.models.client.speculative import SpeculativeMixin
from petals.models.client.tuning import LoraSettings, Tuning
from petals.models.errors import BlockRangeError
from petals.models.source.checkpoint import Checkpoint, open_checkpoint
from petals.peer.base.config import PeerConfig
from petals.peer.client_config import FIELDS, ClientConfig, drop_harmless
from petals.peer.node import Peer
from petals.peer.sync import SyncPeer
from petals.protocols.errors import UserError
from petals.protocols.tensors import FLOATS_BY_NAME


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


if TYPE_CHECKING:

    class _Opened(DistributedMixin, PreTrainedModel, metaclass=_HeadType):  # type: ignore[misc]
        """What a type checker sees of an opened model: what Petals adds, on top of the library's own class."""

        head: ClassVar[Head]
        model_type: ClassVar[str | None]

        def __getattr__(self, name: str) -> Any: ...  # the family's own modules

    class _Generating(GenerationMixin):
        """What a type checker sees of `generate`."""
else:

    class _Opened(metaclass=_HeadType):
        pass

    class _Generating:
        pass


class AutoDistributedModel(_Opened):
    """The decoder without head, over the blocks of a swarm; `outputs.last_hidden_state`."""

    head: ClassVar[Head] = "base"
    model_type: ClassVar[str | None] = None
    mixins: ClassVar[tuple[type, ...]] = ()

    def __init__(self) -> None:
        raise UserError(f"{type(self).__name__} is opened with from_pretrained(...)")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        peer: SyncPeer | Peer | None = None,
        **kwargs: Any,
    ) -> Self:
        """Open a model over a swarm: embeddings and head are loaded here, blocks are never read.

        Args:
            model_name_or_path: hub name, local directory or .gguf file; None: the default model.
            peer: one that is open already (`petals.connect`, `open_peer`), instead of `initial_peers`. An `open_peer`
                one is used from a worker thread; in its own trio thread await `afrom_pretrained`. Petals' name of it,
                `dht`, is taken, too.
            config: what `AutoDistributedConfig.from_pretrained` gave, with its settings of the swarm, or a
                configuration of `transformers`; entries that differ from the checkpoint's are changed.
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
        request = _Request.of(model_name_or_path, kwargs)
        opened = _opened(peer or request.peer, request.client)
        model: Self = opened.portal.run(partial(cls._open, opened, request))
        return model

    @classmethod
    async def afrom_pretrained(
        cls, model_name_or_path: str | os.PathLike[str] | None = None, *, peer: Peer, **kwargs: Any
    ) -> Self:
        """`from_pretrained` for trio programs."""
        model: Self = await cls._open(peer, _Request.of(model_name_or_path, kwargs))
        return model

    @classmethod
    async def _open(cls, peer: Peer, request: _Request) -> Any:
        checkpoint = await peer.checkpoint(request.name, revision=request.revision, token=request.token)
        model_type = checkpoint.config.model_type
        if cls.model_type not in (None, model_type):
            raise UserError(
                f"{request.name or 'the default model'} is a {model_type}, not a {cls.model_type}: open it with "
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
                **_changed(request.config, checkpoint),
                **request.settings,
            )
        )


class AutoDistributedModelForCausalLM(_Generating, AutoDistributedModel):  # type: ignore[misc]
    """A language model over the blocks of a swarm; `generate`, `outputs.logits`."""

    head = "causal_lm"
    mixins = (GenerationMixin,)


class AutoDistributedSpeculativeModel(AutoDistributedModelForCausalLM):
    """A language model over the blocks of a swarm whose greedy decoding is drafted by a small local model."""

    mixins = (SpeculativeMixin,)

    @classmethod
    async def _open(cls, peer: Peer, request: _Request) -> Any:
        if request.small_model is None:
            raise UserError("speculative decoding needs small_model=..., a local model with the same vocabulary")
        model = await super()._open(peer, request)
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
        **settings: Any,
    ) -> PretrainedConfig:
        """The configuration, for `from_pretrained(config=)` and `RemoteSequential(config)`.

        Args:
            settings: fields of `ClientConfig` (`initial_peers`, `active_adapter`, ...), which become attributes, and
                entries of the configuration to change.
        Raises:
            CheckpointError: a name that leads nowhere. UserError: another family than the class is of, an argument that
                cannot be.
        """
        drop_harmless(settings)
        said = {name: settings.pop(name) for name in list(settings) if name in FIELDS}
        ClientConfig(**said)  # raises for what cannot be
        config = copy.deepcopy(open_checkpoint(model_name_or_path, revision=revision, token=token).config)
        if cls.model_type not in (None, config.model_type):
            raise UserError(f"{model_name_or_path} is a {config.model_type}, not a {cls.model_type}")
        if unknown := [name for name in settings if not hasattr(config, name)]:
            raise UserError(f"unknown argument {unknown[0]!r}: {type(config).__name__} has no such entry")
        for name, value in (said | settings).items():
            setattr(config, name, value)
        source = {"name": model_name_or_path, "revision": revision, "token": token}
        object.__setattr__(config, _SOURCE, source)
        return config


_SOURCE = "_petals_source"
"""Attribute of a configuration: which model it is of."""


class _AnyBlocks(type):
    """`isinstance(model.transformer.h, RemoteSequential)`: the blocks of every model are."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Blocks)


class RemoteSequential(Blocks, metaclass=_AnyBlocks):
    """Consecutive blocks of a model in a swarm, without the model around: `RemoteSequential(config)(hidden)`."""

    def __init__(
        self,
        config: PretrainedConfig | BlockChain | None = None,
        *,
        dht: SyncPeer | Peer | None = None,
        peer: SyncPeer | Peer | None = None,
        start_block: int | None = None,
        end_block: int | None = None,
        **settings: Any,
    ) -> None:
        """
        Args:
            config: what `AutoDistributedConfig.from_pretrained` gave.
            dht, peer: an open peer; None: one that joins the configuration's `initial_peers`.
            start_block, end_block: half-open; None: from the first, to the last.
            settings: fields of `ClientConfig`, before the configuration's.
        Raises:
            MissingBlocks, UserError: as `AutoDistributedModel.from_pretrained`; BlockRangeError.
        """
        super().__init__()
        if config is None or not isinstance(config, PretrainedConfig):
            if config is not None:
                self.connect(config)
            return
        request = _Request.of(None, {"config": config, **settings})
        opened = _opened(peer or dht, request.client)
        chain = opened.portal.run(_whole_chain, opened, request)
        blocks = range(start_block or 0, len(chain.blocks) if end_block is None else end_block)
        if not 0 <= blocks.start < blocks.stop <= len(chain.blocks):
            raise BlockRangeError(f"blocks {blocks.start}:{blocks.stop} are not within 0:{len(chain.blocks)}")
        self.connect(chain.slice(blocks))


async def _whole_chain(peer: Peer, request: _Request) -> BlockChain:
    checkpoint = await peer.checkpoint(request.name, revision=request.revision, token=request.token)
    client = await peer.client_for(checkpoint)
    await client.ready(request.client)
    return client.chain(request.client)


def _opened(peer: SyncPeer | Peer | None, client: ClientConfig) -> Peer:
    if isinstance(peer, Peer):
        return peer
    return (peer or _shared.open(client.peer_config())).peer


@dataclass(frozen=True, slots=True)
class _Request:
    """The keyword arguments of `from_pretrained`, sorted."""

    name: str | None
    client: ClientConfig
    tuning: Tuning
    dtype: torch.dtype | None
    revision: str | None
    token: str | None
    small_model: Any
    peer: SyncPeer | Peer | None
    config: PretrainedConfig | None
    settings: dict[str, Any]

    @classmethod
    def of(cls, name: str | os.PathLike[str] | None, kwargs: dict[str, Any]) -> _Request:
        rest = dict(kwargs)
        drop_harmless(rest)
        config = rest.pop("config", None)
        source = getattr(config, _SOURCE, None) or {}
        client = rest.pop("client_config", None) or ClientConfig()
        kept = {} if config is None else {name: value for name, value in vars(config).items() if name in FIELDS}
        said = kept | {name: rest.pop(name) for name in list(rest) if name in FIELDS}
        client = replace(client, **said)
        lora = rest.pop("lora_config", None)
        tuning, dtype = _tuning(client, lora), _dtype(rest)
        if "use_auth_token" in rest:
            rest["token"] = rest.pop("use_auth_token")
        revision, token = (rest.pop(name, None) or source.get(name) for name in ("revision", "token"))
        named = source.get("name", getattr(config, "_name_or_path", None) or None) if name is None else name
        return cls(
            None if named is None else os.fspath(named),
            client,
            tuning,
            dtype,
            revision,
            token if isinstance(token, str) else None,  # True: the saved one, which is used anyway
            rest.pop("small_model", None),
            rest.pop("dht", None),
            config,
            rest,
        )


def _changed(config: PretrainedConfig | None, checkpoint: Checkpoint) -> dict[str, Any]:
    """Entries of a configuration that differ from the checkpoint's.

    Raises:
        UserError: it is of another family.
    """
    if config is None:
        return {}
    if config.model_type != checkpoint.config.model_type:
        raise UserError(
            f"config is of a {config.model_type}, but {checkpoint.name} is a {checkpoint.config.model_type}"
        )
    ours = vars(checkpoint.config)
    return {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_") and name not in FIELDS and (name not in ours or ours[name] != value)
    }


def _tuning(client: ClientConfig, lora: Any) -> Tuning:
    lora = lora or LoraSettings()
    if not isinstance(lora, LoraSettings):
        lora = LoraSettings.of_peft(lora)
    mode: Any = client.tuning_mode  # checked by Tuning
    return Tuning(mode=mode, pre_seq_len=16 if client.pre_seq_len is None else client.pre_seq_len, lora=lora)


def _dtype(rest: dict[str, Any]) -> torch.dtype | None:
    chosen = [value for name in ("dtype", "torch_dtype") if (value := rest.pop(name, None)) is not None]
    if not chosen or chosen[0] == "auto":
        return None
    name = str(chosen[0]).removeprefix("torch.")
    if name not in FLOATS_BY_NAME:
        raise UserError(f"unknown dtype {name!r}: choose auto, {', '.join(FLOATS_BY_NAME)}")
    return FLOATS_BY_NAME[name]
