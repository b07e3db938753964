"""Every flag of every verb may come from the environment or from a TOML file, too.

Nothing here knows a flag by name: argparse is asked what there is and how it reads a value, so a new flag needs
nothing. What is found becomes the parser's default, so the command line wins; the environment wins over the file. A
flag that takes no value, or may go without, is true or false."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from petals.protocols.errors import UserError

PREFIX = "PETALS_"
OTHERS = frozenset({"PETALS_CACHE"})
"""Variables that are no flags, though they look like one (models/source/checkpoint.py)."""
SWITCH = {"1": True, "true": True, "0": False, "false": False}
EXPLANATION = (
    "Every flag may also be an environment variable (PETALS_LISTEN, PETALS_INITIAL_PEERS; spaces separate lists, 1 or "
    "0 for flags without a value) or a key of a TOML file: at its top for all verbs, in a table such as [{verb}] for "
    "one. "
    "The command line goes before the environment, the environment before the file."
)


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag, as argparse knows it."""

    action: argparse.Action
    names: tuple[str, ...]
    """As in a file; more than one where a flag has two spellings."""

    @property
    def variables(self) -> tuple[str, ...]:
        """As in the environment."""
        return tuple(PREFIX + name.upper() for name in self.names)

    @property
    def takes_list(self) -> bool:
        return self.action.nargs in ("+", "*")

    @property
    def is_switch(self) -> bool:
        """Whether it may be given without a value."""
        return bool(self.action.option_strings) and self.action.nargs in (0, "?")

    def set(self, value: object, *, source: str) -> None:
        """Take a string, number, boolean or list of them as if it were given.

        Raises:
            UserError: it is not what the flag takes; says where it stood.
        """
        try:
            self.action.default = self._read(value)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{source}: {error}") from None
        self.action.required = False

    def _read(self, value: object) -> Any:
        if self.is_switch and str(value).lower() in SWITCH:
            on = SWITCH[str(value).lower()]
            if self.action.const is None:  # BooleanOptionalAction
                return on
            return self.action.const if on else self.action.default
        if self.action.nargs == 0:
            raise argparse.ArgumentTypeError(f"expected true or false (or 1 or 0), not {value!r}")
        if self.takes_list:
            values = value if isinstance(value, list) else [value]
            if not values and self.action.nargs == "+":
                raise argparse.ArgumentTypeError("expected at least one value")
            return [self._read_one(each) for each in values]
        return self._read_one(value)

    def _read_one(self, value: object) -> Any:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise argparse.ArgumentTypeError(f"expected {'strings' if self.takes_list else 'one value'}, not {value!r}")
        kind = self.action.type or str
        assert callable(kind)
        try:
            read = kind(str(value))
        except (TypeError, ValueError):  # as argparse says it
            name = getattr(kind, "__name__", repr(kind))
            raise argparse.ArgumentTypeError(f"invalid {name} value: {value!r}") from None
        if self.action.choices is not None and read not in self.action.choices:
            choices = ", ".join(map(repr, self.action.choices))
            raise argparse.ArgumentTypeError(f"invalid choice: {value!r} (choose from {choices})")
        return read


def flags_of(parser: argparse.ArgumentParser) -> Iterator[Flag]:
    """All that a user may leave out."""
    for action in parser._actions:
        if action.dest in ("help", "version") or not (action.option_strings or action.nargs == "?"):
            continue
        spellings = [word[2:].replace("-", "_") for word in action.option_strings if word.startswith("--")]
        yield Flag(action, tuple(spellings) or (action.dest,))


def add_config_flag(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add --config, and say in --help what can stand in it."""
    group = parser.add_argument_group("settings", EXPLANATION.format(verb=verb))
    group.add_argument("--config", metavar="FILE", type=Path, help="a TOML file")


def apply(
    parsers: Mapping[str, argparse.ArgumentParser], verb: str, argv: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    """Give the verb's flags the defaults that the environment and the file named by --config want.

    Returns: complaints about variables that look like a flag's and are none.

    Raises:
        UserError: a file that can not be read, a key that names no flag, or a value that the flag does not take.
    """
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    asked.add_argument("--config", nargs="?")
    file = asked.parse_known_args(list(argv))[0].config or environment.get(PREFIX + "CONFIG")
    values = {} if not file else _read_file(Path(file), parsers, verb)
    for flag in flags_of(parsers[verb]):
        said: list[tuple[str, Any]] = [
            (variable, text.replace(",", " ").split() if flag.takes_list else text)
            for variable in flag.variables
            if (text := environment.get(variable))  # one that is set but empty says nothing
        ]
        said += [values[name] for name in flag.names if name in values]
        for source, value in said[:1]:
            flag.set(value, source=source)
            for other in parsers[verb]._actions:  # --share_weights and --no_share_weights say the same in two ways
                if other.dest == flag.action.dest:
                    other.default = flag.action.default
    return list(_strangers(parsers, environment))


def _read_file(path: Path, parsers: Mapping[str, argparse.ArgumentParser], verb: str) -> dict[str, tuple[str, Any]]:
    """Flag -> where it stood, and its value; the verb's own table goes before what is said for all verbs."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except ValueError as error:  # neither TOML nor text
        raise UserError(f"{path}: {error}") from None
    names = {
        each: {name for flag in flags_of(parser) for name in flag.names} - {"config"}
        for each, parser in parsers.items()
    }
    everybodys = set().union(*names.values())
    values: dict[str, tuple[str, Any]] = {}
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    for key, value in content.items():
        if key not in tables:
            name = _known(key, everybodys, str(path))
            values[name] = (f"{path}: {key}", value)
    for table, entries in tables.items():
        _known(table, set(parsers), str(path), brackets=True)
        for key, value in entries.items():
            name = _known(key, names[table], f"{path}: [{table}]")
            if table == verb:
                values[name] = (f"{path}: [{table}] {key}", value)
    return values


def _known(key: str, names: set[str], source: str, *, brackets: bool = False) -> str:
    name = key.replace("-", "_")
    if name in names:
        return name
    shown = "[{}]" if brackets else "{}"
    near = get_close_matches(name, sorted(names), n=1, cutoff=0)
    hint = f"; did you mean {shown.format(near[0])}?" if near else ""
    raise UserError(f"{source}: no {'verb' if brackets else 'flag'} is called {shown.format(key)}{hint}")


def _strangers(parsers: Mapping[str, argparse.ArgumentParser], environment: Mapping[str, str]) -> Iterator[str]:
    known = {variable for parser in parsers.values() for flag in flags_of(parser) for variable in flag.variables}
    for variable in sorted(environment):
        if variable.startswith(PREFIX) and variable not in known | OTHERS:
            # Near ones only: others may use the prefix for their own ends.
            for near in get_close_matches(variable, sorted(known), n=1, cutoff=0.9):
                yield f"{variable} names no flag; did you mean {near}?"
