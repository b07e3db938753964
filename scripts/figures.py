"""Puts what benchmarks printed into docs/performance.md, and draws the tables that are better seen.

    python scripts/figures.py [--results benchmarks/results] [--page docs/performance.md]

A benchmark's place in the page is between `<!-- bench: NAME -->` and `<!-- end -->`; what is not among the results
stays as it is. Run by scripts/bench.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_PLACE = re.compile(r"(<!-- bench: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NUMBER = re.compile(r"-?[\d,]*\.?\d+(?:e[+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Table:
    """A Markdown table."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def names(self) -> list[str]:
        """The first column."""
        return [row[0] for row in self.rows]

    def numbers(self, column: int) -> list[float]:
        """The first number of each cell of a column; an empty one is no number."""
        return [number_in(row[column]) for row in self.rows]


def number_in(cell: str) -> float:
    """The first number of a cell such as "38.0 (37.8 - 38.2)". Raises ValueError when there is none."""
    found = _NUMBER.search(cell)
    if found is None:
        raise ValueError(f"no number in {cell!r}")
    return float(found[0].replace(",", ""))


def tables_in(text: str) -> list[Table]:
    """Every table of a Markdown text."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        lines = [tuple(cell.strip() for cell in line.strip().strip("|").split("|")) for line in block.splitlines()]
        if len(lines) > 2:
            found.append(Table(lines[0], tuple(lines[2:])))
    return found


def fill(page: str, results: Mapping[str, str]) -> str:
    """The page with these results in their places."""

    def place(match: re.Match[str]) -> str:
        text = results.get(match["name"])
        return match[0] if text is None else f"{match[1]}\n{text.strip()}\n\n{match[3]}"

    return _PLACE.sub(place, page)


def bars(axes: Any, table: Table, column: int, unit: str) -> None:
    """A bar for each row, the first one as the reference."""
    values = table.numbers(column)
    colours = ["#8a8f98" if index == 0 else "#c2557f" for index in range(len(values))]
    drawn = axes.barh(table.names(), values, color=colours)
    axes.bar_label(drawn, [f" {value:g}" for value in values])
    axes.axvline(values[0], color="#8a8f98", linewidth=0.8, linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel(unit)


def draw_decode(axes: Any, tables: Sequence[Table]) -> None:
    """Tokens per second against `transformers`."""
    bars(axes, tables[0], 1, "tokens/s")


def draw_concurrency(axes: Any, tables: Sequence[Table]) -> None:
    """Steps per second of all sessions together."""
    sessions = [int(name) for name in tables[0].names()]
    together = tables[0].numbers(1)
    axes.plot(sessions, together, "o-", color="#c2557f", label="together")
    axes.plot(sessions, [together[0] * count for count in sessions], ":", color="#8a8f98", label="each as fast as one")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sessions, [str(count) for count in sessions])
    axes.set_xlabel("sessions")
    axes.set_ylabel("steps/s")
    axes.legend(frameon=False)


def draw_prompts(axes: Any, tables: Sequence[Table]) -> None:
    """Tokens of a prompt per second."""
    bars(axes, tables[0], 1, "tokens/s")


PLOTS: Mapping[str, Callable[[Any, Sequence[Table]], None]] = {
    "decode": draw_decode,
    "decode-bloom": draw_decode,
    "decode-llama": draw_decode,
    "concurrency": draw_concurrency,
    "prompts": draw_prompts,
}
"""What is drawn of which benchmark."""


def draw(results: Mapping[str, str], directory: Path) -> list[Path]:
    """Write the plots of these results; returns their files."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update(
        {"svg.hashsalt": "petals", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    from matplotlib import pyplot

    written = []
    for name, plot in PLOTS.items():
        tables = tables_in(results.get(name, ""))
        if not tables:
            continue
        figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
        plot(axes, tables)
        written.append(directory / f"bench-{name}.svg")
        figure.savefig(written[-1], metadata={"Date": None})
        pyplot.close(figure)
    return written


def main() -> None:
    """Fill and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args()
    results = {file.stem: file.read_text() for file in options.results.glob("*.md")}
    options.page.write_text(fill(options.page.read_text(), results))
    draw(results, options.page.parent / "images")


if __name__ == "__main__":
    main()
