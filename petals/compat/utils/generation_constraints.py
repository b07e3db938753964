"""`petals.utils.generation_constraints` of Petals 1.0."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import CONSTRAINTS

__getattr__, __dir__ = moved(
    __name__,
    dict.fromkeys(("ABCBloomConstraint", "EosConstraint", "MaxNewTokensConstraint"), CONSTRAINTS),
)
