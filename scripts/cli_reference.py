"""The tables of docs/cli.md, from the parsers themselves.

python scripts/cli_reference.py            write them
python scripts/cli_reference.py --check    only say whether they are as the parsers say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from petals.cli.main import parsers

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
BEGIN = "<!-- from here on written by scripts/cli_reference.py -->\n"


def reference() -> Iterator[str]:
    """Lines of Markdown: a section for each verb, a table for each of its groups of flags."""
    for verb, parser in parsers()[1].items():
        yield f"## petals {verb}\n"
        yield f"{parser.description}\n"
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if action.dest not in ("help", "config")]
            if not actions:
                continue
            yield f"| {title_of(group)} | |\n|---|---|"
            for action in actions:
                yield f"| {spelling(action)} | {escaped(action.help or '')} |"
            yield ""


def title_of(group: argparse._ArgumentGroup) -> str:
    """argparse's own two groups have names of its own."""
    return {"positional arguments": "argument", "options": "flags"}.get(group.title or "", group.title or "")


def spelling(action: argparse.Action) -> str:
    """As in the usage line: `[A:B]`, `ADDR [ADDR ...]`."""
    value = action.metavar or action.dest.upper()
    if action.choices is not None:
        value = "|".join(map(str, action.choices))
    values = {0: "", "?": f"[{value}]", "+": f"{value} [{value} ...]", "*": f"[{value} ...]"}.get(
        action.nargs or ("one" if action.nargs is None else 0), str(value)
    )
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    return " ".join(filter(None, (names, f"`{escaped(values)}`" if values else "")))


def escaped(text: str) -> str:
    """For a cell of a table."""
    return text.replace("%%", "%").replace("|", r"\|")


def main() -> None:
    """Write or check."""
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--check", action="store_true")
    by_hand = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    wanted = by_hand + BEGIN + "\n".join(reference()).rstrip() + "\n"
    if not words.parse_args().check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != wanted:
        sys.exit("docs/cli.md is not what the parsers say: run python scripts/cli_reference.py")


if __name__ == "__main__":
    main()
