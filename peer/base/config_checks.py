"""Checks of settings. A wrong field gets one ConfigError that names it, says what it was and what is allowed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NewType, NoReturn, Union, get_args, get_origin, get_type_hints

from petals.protocols.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Within:
    """An interval of numbers; `above` and `below` leave its ends out. NaN is in none."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def admits(self, number: float) -> bool:
        is_high = number > self.low if self.above else number >= self.low
        return is_high and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:,}" if self.above else f"at least {self.low:,}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if self.below else 'at most'} {self.high:,}"


POSITIVE = Within(0, above=True)
NOT_NEGATIVE = Within(0)
AT_LEAST_1 = Within(1)
SHARE = Within(0, 1)


def check_fields(config: Any, bounds: Mapping[str, Within]) -> None:
    """Check every field of a dataclass against its annotation, and numbers against `bounds`.

    Lists become tuples and frozensets, and text becomes a path, where the field is one.

    Raises:
        ConfigError: the first field that is wrong.
    """
    hints = get_type_hints(type(config))
    for each in fields(config):
        hint = hints[each.name]
        value = _converted(getattr(config, each.name), hint)
        bound = bounds.get(each.name)
        if not _fits(value, hint) or (bound is not None and value is not None and not bound.admits(value)):
            refuse(config, each.name, _described(hint) + (f", {bound}" if bound is not None else ""))
        if value is not getattr(config, each.name):
            object.__setattr__(config, each.name, value)


def refuse(config: Any, name: str, allowed: str) -> NoReturn:
    """Raise the ConfigError of a field."""
    secret = not next(each for each in fields(config) if each.name == name).repr
    value = "(not shown)" if secret else repr(getattr(config, name))
    raise ConfigError(type(config).__name__, name, value, allowed)


def check_addresses(config: Any, *names: str) -> None:
    """Check that fields hold multiaddrs: a first look only, the rest is checked when they are used.

    Raises:
        ConfigError: something else.
    """
    for name in names:
        if not all(addr.startswith("/") for addr in getattr(config, name)):
            refuse(config, name, "multiaddrs, such as ('/ip4/192.0.2.7/tcp/31337',)")


def _converted(value: Any, hint: Any) -> Any:
    kinds = {get_origin(part) or part for part in _parts(hint)}
    if tuple in kinds and isinstance(value, (list, tuple)):
        item = get_args(next(part for part in _parts(hint) if get_origin(part) is tuple))[0]
        return tuple(_converted(each, item) for each in value)
    if frozenset in kinds and isinstance(value, (list, tuple, set)):
        return frozenset(value)
    if Path in kinds and str not in kinds and isinstance(value, (str, os.PathLike)):
        return Path(value)
    return value


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says. Annotations of a kind that no configuration has are not checked."""
    origin = get_origin(hint)
    if isinstance(hint, NewType):
        return _fits(value, hint.__supertype__)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return any(value is each or (value == each and type(value) is type(each)) for each in get_args(hint))
    if origin in (tuple, frozenset):
        return isinstance(value, origin) and all(_fits(each, get_args(hint)[0]) for each in value)
    if origin is not None:
        return callable(value) if origin is Callable else isinstance(value, origin)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    Path: "a path",
    range: "a range",
    NoneType: "None",
}


def _described(hint: Any) -> str:
    """What an annotation allows, in words."""
    origin = get_origin(hint)
    if isinstance(hint, NewType):
        return {"PeerId": "a peer ID"}.get(hint.__name__, _described(hint.__supertype__))
    if origin in (Union, UnionType):
        return " or ".join(_described(part) for part in get_args(hint))
    if origin is Literal:
        return one_of(get_args(hint))
    if origin in (tuple, frozenset):
        kind = "tuple" if origin is tuple else "set"
        return f"a {kind} of {_described(get_args(hint)[0]).removeprefix('a ')}s"
    if origin is not None:
        return "a function" if origin is Callable else f"a {origin.__name__}"
    return _WORDS.get(hint) or (f"a {hint.__name__}" if isinstance(hint, type) else str(hint))


def one_of(values: Collection[Any]) -> str:
    """ "a", "b" or "c": as people list choices."""
    words = [repr(each) for each in values]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
