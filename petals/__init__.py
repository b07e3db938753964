"""Petals on libp2p: run and fine-tune language models together, each peer holding some of the blocks.

The names below are the public API; docs/api.md says which of them are stable. They are imported when they are first
used: `petals --help` and `run_dht` start without torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from petals.errors import PetalsError
    from petals.models.client.generation import InferenceSession
    from petals.models.client.tuning import LoraSettings
    from petals.models.errors import (
        BlockRangeError,
        CacheFull,
        CheckpointError,
        DocumentError,
        ModelError,
        SourceUnreachable,
        StepError,
        UnsupportedLibrary,
        UnsupportedModel,
    )
    from petals.peer.base.config import LanConfig, NatConfig, PeerConfig, RelayLimits, ServeConfig, Timeouts
    from petals.peer.base.identity import IdentityError
    from petals.peer.client.constraints import Constraint, ConstraintError
    from petals.peer.client.generation.generation import Seconds, Token, TokenStream
    from petals.peer.client.generation.generation_options import GenerationOptions
    from petals.peer.client.generation.prompts import Chat, Prompt, PromptTooLong
    from petals.peer.client.model_client import ClientOptions
    from petals.peer.client_config import ClientConfig
    from petals.peer.node import Peer, open_peer
    from petals.peer.pretrained import (
        AutoDistributedConfig,
        AutoDistributedModel,
        AutoDistributedModelForCausalLM,
        AutoDistributedModelForSequenceClassification,
        AutoDistributedSpeculativeModel,
        RemoteSequential,
    )
    from petals.peer.pretrained_families import (
        DistributedBloomConfig,
        DistributedBloomForCausalLM,
        DistributedBloomForSequenceClassification,
        DistributedBloomForSpeculativeGeneration,
        DistributedBloomModel,
        DistributedFalconConfig,
        DistributedFalconForCausalLM,
        DistributedFalconForSequenceClassification,
        DistributedFalconForSpeculativeGeneration,
        DistributedFalconModel,
        DistributedLlamaConfig,
        DistributedLlamaForCausalLM,
        DistributedLlamaForSequenceClassification,
        DistributedLlamaForSpeculativeGeneration,
        DistributedLlamaModel,
        DistributedMixtralConfig,
        DistributedMixtralForCausalLM,
        DistributedMixtralForSequenceClassification,
        DistributedMixtralForSpeculativeGeneration,
        DistributedMixtralModel,
    )
    from petals.peer.sync import SyncPeer, connect
    from petals.protocols.errors import (
        ConfigError,
        Forbidden,
        LocalProtocolError,
        MissingBlocks,
        NeverFits,
        PeerBusy,
        PeerUnreachable,
        ProtocolViolation,
        RemoteError,
        RemoteProtocolError,
        RequestRefused,
        RouteError,
        SwarmError,
        UserError,
        WrongAnswer,
    )

__all__ = [
    "AutoDistributedConfig",
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "AutoDistributedSpeculativeModel",
    "BlockRangeError",
    "CacheFull",
    "Chat",
    "CheckpointError",
    "ClientConfig",
    "ClientOptions",
    "ConfigError",
    "Constraint",
    "ConstraintError",
    "DistributedBloomConfig",
    "DistributedBloomForCausalLM",
    "DistributedBloomForSequenceClassification",
    "DistributedBloomForSpeculativeGeneration",
    "DistributedBloomModel",
    "DistributedFalconConfig",
    "DistributedFalconForCausalLM",
    "DistributedFalconForSequenceClassification",
    "DistributedFalconForSpeculativeGeneration",
    "DistributedFalconModel",
    "DistributedLlamaConfig",
    "DistributedLlamaForCausalLM",
    "DistributedLlamaForSequenceClassification",
    "DistributedLlamaForSpeculativeGeneration",
    "DistributedLlamaModel",
    "DistributedMixtralConfig",
    "DistributedMixtralForCausalLM",
    "DistributedMixtralForSequenceClassification",
    "DistributedMixtralForSpeculativeGeneration",
    "DistributedMixtralModel",
    "DocumentError",
    "Forbidden",
    "GenerationOptions",
    "IdentityError",
    "InferenceSession",
    "LanConfig",
    "LocalProtocolError",
    "LoraSettings",
    "MissingBlocks",
    "ModelError",
    "NatConfig",
    "NeverFits",
    "Peer",
    "PeerBusy",
    "PeerConfig",
    "PeerUnreachable",
    "PetalsError",
    "Prompt",
    "PromptTooLong",
    "ProtocolViolation",
    "RelayLimits",
    "RemoteError",
    "RemoteProtocolError",
    "RemoteSequential",
    "RequestRefused",
    "RouteError",
    "Seconds",
    "ServeConfig",
    "SourceUnreachable",
    "StepError",
    "SwarmError",
    "SyncPeer",
    "Timeouts",
    "Token",
    "TokenStream",
    "UnsupportedLibrary",
    "UnsupportedModel",
    "UserError",
    "WrongAnswer",
    "__version__",
    "connect",
    "open_peer",
]

_MODULES = {
    "petals.errors": "PetalsError",
    "petals.models.client.generation": "InferenceSession",
    "petals.models.client.tuning": "LoraSettings",
    "petals.models.errors": (
        "BlockRangeError CacheFull CheckpointError DocumentError ModelError SourceUnreachable StepError "
        "UnsupportedLibrary UnsupportedModel"
    ),
    "petals.peer.base.config": "LanConfig NatConfig PeerConfig RelayLimits ServeConfig Timeouts",
    "petals.peer.base.identity": "IdentityError",
    "petals.peer.client.constraints": "Constraint ConstraintError",
    "petals.peer.client.generation.generation": "Seconds Token TokenStream",
    "petals.peer.client.generation.generation_options": "GenerationOptions",
    "petals.peer.client.generation.prompts": "Chat Prompt PromptTooLong",
    "petals.peer.client.model_client": "ClientOptions",
    "petals.peer.client_config": "ClientConfig",
    "petals.peer.node": "Peer open_peer",
    "petals.peer.pretrained": (
        "AutoDistributedConfig AutoDistributedModel AutoDistributedModelForCausalLM "
        "AutoDistributedModelForSequenceClassification AutoDistributedSpeculativeModel RemoteSequential"
    ),
    "petals.peer.pretrained_families": (
        "DistributedBloomConfig DistributedBloomForCausalLM DistributedBloomForSequenceClassification "
        "DistributedBloomForSpeculativeGeneration DistributedBloomModel DistributedFalconConfig "
        "DistributedFalconForCausalLM DistributedFalconForSequenceClassification "
        "DistributedFalconForSpeculativeGeneration DistributedFalconModel DistributedLlamaConfig "
        "DistributedLlamaForCausalLM DistributedLlamaForSequenceClassification "
        "DistributedLlamaForSpeculativeGeneration DistributedLlamaModel DistributedMixtralConfig "
        "DistributedMixtralForCausalLM DistributedMixtralForSequenceClassification "
        "DistributedMixtralForSpeculativeGeneration DistributedMixtralModel"
    ),
    "petals.peer.sync": "SyncPeer connect",
    "petals.protocols.errors": (
        "ConfigError Forbidden LocalProtocolError MissingBlocks NeverFits PeerBusy PeerUnreachable "
        "ProtocolViolation RemoteError RemoteProtocolError RequestRefused RouteError SwarmError UserError WrongAnswer"
    ),
}
"""Where the names live; tests/test_public_api.py compares this with what type checkers read above."""
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__path__.append(os.path.join(os.path.dirname(__file__), "compat"))
"""Petals' own module paths (`petals.client`, `petals.utils`, ...) lead to thin modules in that folder."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # a type checker would take any name for one that is there

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        if not name.startswith("_"):
            from petals.compat.top_level import __getattr__ as moved

            return moved(name)
        raise AttributeError(f"module 'petals' has no attribute {name!r}")
