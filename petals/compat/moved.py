"""A module that only says where its names are now."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gone:
    """A name without a counterpart."""

    instead: str
    """What to do instead."""


Homes = Mapping[str, "str | Gone"]
"""Name -> "module", or "module:other name", or that it is gone."""
INSIDE = "petals.compat."
TABLES: dict[str, Homes] = {}
"""Of every module imported so far, for the tests and the page."""


def moved(module: str, names: Homes) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for `module`: its names come from elsewhere, with a note the first time."""
    TABLES[module] = names

    def __getattr__(name: str) -> Any:
        home = names.get(name)
        if home is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if isinstance(home, Gone):
            raise ImportError(f"{module}.{name} is not there any more: {home.instead}")
        place, _, renamed = home.partition(":")
        if not place.startswith(INSIDE):
            text = f"{module}.{name} has moved: from {place} import {renamed or name}"
        else:  # kept for old programs only
            text = f"{module}.{name} is kept for programs written for Petals: see docs/migrating.md"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(place), renamed or name)

    return __getattr__, lambda: sorted(names)
