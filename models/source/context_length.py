"""How many tokens a model can look back on, as its configuration says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STRETCHING = ("linear", "dynamic", "yarn")
"""Rotary scalings that model cards tell people to add to a configuration whose length stays as trained. `llama3` and
`longrope` come with a length that counts them already."""


def longest_context(config: Any) -> int | None:
    """Tokens of prompt and answer together; None: the configuration knows no limit.

    Rotary scaling counts: `max_position_embeddings` is what the model was trained with, and a factor of 4 makes it look
    back on four times as many.

    Args:
        config: of the text model.
    """
    trained = getattr(config, "max_position_embeddings", None)
    if not isinstance(trained, int):
        return None
    # transformers 5 calls it rope_parameters; there it may also be one mapping per kind of layer
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(scaling, Mapping):
        return trained
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if scaling.get("rope_type", scaling.get("type")) not in _STRETCHING or not isinstance(factor, int | float):
        return trained
    return max(trained, int(factor * (original if isinstance(original, int) else trained)))
