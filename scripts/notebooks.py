"""Write every example as a notebook beside its script. The scripts are the source: cells begin with `# %%`."""

from __future__ import annotations

import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def notebook(script: str) -> str:
    """The notebook (nbformat 4.5) of a script in the percent format."""
    cells = []
    for index, (kind, text) in enumerate(re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", script, re.M | re.S)):
        lines = text.strip("\n").splitlines(keepends=True)
        cell: dict[str, object] = {"id": f"cell-{index}", "metadata": {}}
        if kind:
            cells.append({"cell_type": "markdown", **cell, "source": [re.sub(r"^# ?", "", line) for line in lines]})
        else:
            cells.append({"cell_type": "code", **cell, "execution_count": None, "outputs": [], "source": lines})
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write them all."""
    for script in EXAMPLES.glob("*.py"):
        if script.name != "common.py":
            script.with_suffix(".ipynb").write_text(notebook(script.read_text()))


if __name__ == "__main__":
    main()
