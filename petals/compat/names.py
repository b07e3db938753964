"""Names that several old modules share, and the small ones."""

from __future__ import annotations

import logging
from typing import Any

from petals.compat.moved import Gone

AUTO_CLASSES = (
    "AutoDistributedConfig",
    "AutoDistributedModel",
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "AutoDistributedSpeculativeModel",
)
ANNOUNCED = Gone("a peer that serves announces its blocks by itself")
BENCH = Gone("petals bench measures")
CONSTRAINTS = Gone("give logits_processor= or stopping_criteria= to generate, as transformers has them")
NO_DUMMY = Gone("leave optional tensors out, or pass None")
PLACEMENT = Gone("petals.peer.server.placement decides, about records of this network")
SAMPLING = Gone("give do_sample, temperature, top_k, top_p or num_beams to generate")
SERVING = Gone("petals peer --serve, or open_peer(PeerConfig(serve=ServeConfig(...))): see docs/serving.md")
STATUS = Gone("petals status lists the round trips")
TUNING = Gone("give tuning_mode= and pre_seq_len= to from_pretrained")
WRAPPED_BLOCK = Gone(
    "blocks run as the family's own transformers code; petals.models.source.loading.load_span loads them"
)
PUBLIC_INITIAL_PEERS: list[str] = []
"""No public swarm is known to us; an empty list leaves the choice to $PETALS_INITIAL_PEERS."""
TOP_LEVEL: dict[str, Any] = {
    "RemoteSequenceManager": "petals.peer.client.sequence_manager",
    "SequenceManagerConfig": "petals:ClientConfig",
    "NoSpendingPolicy": "petals.compat.spending",
    "SpendingPolicyBase": "petals.compat.spending",
    "RemoteTransformerBlock": "petals:RemoteSequential",
    "get_remote_module_infos": "petals.compat.directory",
    "declare_active_modules": ANNOUNCED,
    "BloomBlock": WRAPPED_BLOCK,
    "initialize_logs": "petals.compat.names",
} | {f"Wrapped{family}Block": WRAPPED_BLOCK for family in ("Bloom", "Llama", "Falcon", "Mixtral")}
"""What stood in `petals` itself and does not here."""


def family_classes(family: str) -> tuple[str, ...]:
    """The names of a family's classes in `petals`."""
    suffixes = ("Config", "Model", "ForCausalLM", "ForSequenceClassification")
    speculative = ("ForSpeculativeGeneration",) if family == "Llama" else ()
    return tuple(f"Distributed{family}{suffix}" for suffix in suffixes + speculative)


def initialize_logs() -> None:
    """Let the package's loggers say what happens, on stderr."""
    logging.basicConfig(level=logging.INFO)


def get_compatible_model_repo(model_name_or_path: str | None) -> str | None:
    """The hub name of the original where a copy converted for Petals 1 is named."""
    return model_name_or_path if model_name_or_path is None else model_name_or_path.removesuffix("-petals")
