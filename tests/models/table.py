"""The table of families in docs/models.md, made from the tests' own cases.

python -m tests.models.table        # writes it
"""

from __future__ import annotations

from pathlib import Path

from petals.models.families import families
from tests.models.tiny import CASES

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
_BEGIN = "<!-- families:"
_END = "<!-- end of families -->"


def table() -> str:
    """Markdown, one row per case."""
    titles = {family.model_type: family.title for family in families()}
    rows = [f"| {titles[case.model_type]} | `{case.model_type}` | {case.proves} |" for case in CASES]
    return "\n".join(["| family | `model_type` | this checkpoint has |", "|---|---|---|", *rows])


def with_table(document: str) -> str:
    """The document with the table of today."""
    before, rest = document.split(_BEGIN)
    comment, rest = rest.split("\n", 1)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}{comment}\n{table()}\n{_END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
