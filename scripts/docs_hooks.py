"""What mkdocs must be told about this house: pages that live outside of docs/, and pages that may be there or not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "index.md": "README.md",
    "SPEC.md": "protocols/SPEC.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "examples.md": "examples/README.md",
}
"""Page of the site -> file of the house."""
_PAGE_OF = {path: page for page, path in ELSEWHERE.items()}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out what is not there; put what nobody named at the end."""
    there = {path.name for path in Path(config.docs_dir).glob("*.md")} | set(ELSEWHERE)
    named: set[str] = set()

    def kept(entry: Any) -> Any:
        if isinstance(entry, str):
            named.add(entry)
            return entry if entry in there else None
        ((title, below),) = entry.items()
        if isinstance(below, str):
            return {title: below} if kept(below) else None
        return {title: [each for each in map(kept, below) if each is not None]}

    nav = [each for each in map(kept, config.nav or []) if each is not None]
    rest = sorted(there - named)
    config.nav = [*nav, {"More": rest}] if rest else nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live elsewhere, and the pictures of the examples."""
    for page, path in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for picture in (ROOT / "examples" / "results").glob("*.png"):
        files.append(File.generated(config, f"images/examples/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are right in the repository, to where their targets lie on the site. Code is left alone."""
    home = (ROOT / ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def moved(found: re.Match[str]) -> str:
        picture, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        path = (home / target).resolve()
        if not path.is_relative_to(ROOT):
            return found[0]  # mkdocs will complain
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("docs/"):
            return f"{picture}[{text}]({name.removeprefix('docs/')}{anchor})"
        if name in _PAGE_OF:
            return f"{picture}[{text}]({_PAGE_OF[name]}{anchor})"
        if name.startswith("examples/results/"):
            return f"{picture}[{text}](images/examples/{path.name})"
        return f"{text} (`{name}`)" if path.exists() else found[0]

    parts = _CODE.split(markdown)
    return "".join(part if index % 2 else _LINK.sub(moved, part) for index, part in enumerate(parts))
