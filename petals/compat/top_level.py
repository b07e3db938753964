"""What stood in `petals` itself and does not here; `petals/__init__.py` asks this table last."""

from __future__ import annotations

from petals.compat.moved import moved
from petals.compat.names import TOP_LEVEL

__getattr__, __dir__ = moved("petals", TOP_LEVEL)
