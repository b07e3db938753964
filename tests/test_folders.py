"""Folders: each says in one sentence what it is for, imports point down, and CONTRIBUTING.md draws them as they are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("cli", "dht", "gateway", "models", "peer", "protocols")
FOLDERS = sorted({path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")})
DRAWN = re.compile(r"^    (\w[\w/]*) {2,}(\S.*)$", re.MULTILINE)
"""A line of the list in CONTRIBUTING.md: the folder and its sentence."""


def drawn() -> dict[str, str]:
    """Folder -> purpose, from the top to the bottom, as CONTRIBUTING.md lists them."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("\n## The folders", 1)[1].split("\n## ", 1)[0]
    return dict(DRAWN.findall(section))


def purpose_of(folder: Path) -> str:
    """The first line of the package's docstring."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def imports_of(path: Path) -> set[Path]:
    """The folders of the house that a file imports from: in functions, and for type checkers, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")[1:] if name.startswith("petals.") else []
            while parts and not (ROOT.joinpath(*parts).with_suffix(".py").is_file() or ROOT.joinpath(*parts).is_dir()):
                parts.pop()
            if parts:
                place = ROOT.joinpath(*parts)
                found.add(place if place.is_dir() else place.parent)
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_says_what_it_is_for(folder: Path) -> None:
    purpose = purpose_of(folder)
    assert re.fullmatch(r".{20,}\.", purpose), f"{folder}/__init__.py needs a sentence"
    assert drawn().get(str(folder.relative_to(ROOT))) == purpose


def test_folders_import_only_what_is_drawn_below_them() -> None:
    """So there is no cycle between folders; CONTRIBUTING.md lists them from the top to the bottom."""
    order = {folder: place for place, folder in enumerate(drawn())}
    assert set(order) == {str(folder.relative_to(ROOT)) for folder in FOLDERS}
    upward = [
        f"{path.relative_to(ROOT)} imports {target}"
        for folder in FOLDERS
        for path in folder.glob("*.py")
        for target in (str(each.relative_to(ROOT)) for each in imports_of(path) if each != folder)
        if order[target] <= order[str(folder.relative_to(ROOT))]
    ]
    assert not upward
