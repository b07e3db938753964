"""`petals.utils.generation_algorithms` of Petals 1.0."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import SAMPLING

__getattr__, __dir__ = moved(
    __name__,
    dict.fromkeys(
        (
            "DecodingAlgorithm",
            "GreedyAlgorithm",
            "SamplingAlgorithm",
            "TopKAlgorithm",
            "NucleusAlgorithm",
            "BeamSearchAlgorithm",
        ),
        SAMPLING,
    ),
)
