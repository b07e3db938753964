"""The tables of families and formats in docs/models.md, made from the tests' own cases.

python -m tests.models.table        # writes it
"""

from __future__ import annotations

from pathlib import Path

from petals.models.families import families
from petals.models.kernels.ggml import GGML_TYPES
from petals.models.source.formats import FORMATS
from tests.models import packers
from tests.models.tiny import CASES

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
_BEGIN = "<!-- families:"
_END = "<!-- end of families -->"
_FORMATS = "<!-- formats:"
_END_FORMATS = "<!-- end of formats -->"


def table() -> str:
    """Markdown, one row per case."""
    titles = {family.model_type: family.title for family in families()}
    rows = [f"| {titles[case.model_type]} | `{case.model_type}` | {case.proves} |" for case in CASES]
    return "\n".join(["| family | `model_type` | this checkpoint has |", "|---|---|---|", *rows])


def format_table() -> str:
    """Markdown, one row per way to write a checkpoint."""
    titles = {each.method: each.title for each in FORMATS}
    rows = [f"| {titles[case.settings['quant_method']]} | {case.holds} |" for case in packers.CASES]
    rows.append("| MXFP4 | experts (gpt-oss) |")
    rows += [
        f"| GGUF | {kind}, {nbytes} bytes for {weights} weights |" for kind, (weights, nbytes) in GGML_TYPES.items()
    ]
    return "\n".join(["| format | the checkpoint holds |", "|---|---|", *rows])


def with_table(document: str) -> str:
    """The document with the tables of today."""
    for begin, end, made in ((_BEGIN, _END, table()), (_FORMATS, _END_FORMATS, format_table())):
        before, rest = document.split(begin)
        comment, rest = rest.split("\n", 1)
        _, after = rest.split(end)
        document = f"{before}{begin}{comment}\n{made}\n{end}{after}"
    return document


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
