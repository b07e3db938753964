"""transformers' own start, made shorter."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from petals.models.errors import CheckpointError
from petals.models.source.disk import cache_directory, write_json

Names = Mapping[Any, Any]
"""What the modules of a folder export: {folder below: the same, {what has to be installed}: {module: {its names}}}."""

SCANNER = "transformers.utils.import_utils"


def import_models() -> None:
    """Import `transformers.models`, without reading the sources of all its models.

    Symptom (transformers 5.23): for the table of its lazy imports the library reads 2,500 files, 45 MB, each time that
    it is imported, 0.19 s where the disk's cache has them all, and reads them again for `transformers.models`. Here the
    table is kept in the user's cache. And torch comes first, which transformers looks for before it needs it: 0.04 s.
    """
    if "transformers" in sys.modules:
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        import torch  # noqa: F401  # for its place, see above
        import transformers.models  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
        finder.undo()


class _Finder:
    """Finds one module, and has its function that reads the sources ask the table that is kept, until `undo`."""

    def __init__(self) -> None:
        self.undo: Callable[[], None] = lambda: None

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder` says."""
        found = PathFinder.find_spec(name, path) if name == SCANNER else None
        if found is None or found.origin is None or type(found.loader) is not SourceFileLoader:
            return None
        return spec_from_file_location(name, found.origin, loader=_Loader(name, found.origin, self))


class _Loader(SourceFileLoader):
    def __init__(self, name: str, origin: str, finder: _Finder) -> None:
        super().__init__(name, origin)
        self._finder = finder

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        scan = getattr(module, "create_import_structure_from_path", None)
        if scan is None:  # another version: it reads what it wants
            return
        folder = Path(self.path).parents[1] / "models"
        known: list[Names] = []

        def remembered(path: str | Path) -> Names:
            if Path(path) not in (folder, folder / "__init__.py"):
                return scan(path)  # type: ignore[no-any-return]
            if not known:
                known.append(names_of(folder, scan))
            return known[0]

        def undo() -> None:
            module.create_import_structure_from_path = scan  # type: ignore[attr-defined]

        module.create_import_structure_from_path = remembered  # type: ignore[attr-defined]
        self._finder.undo = undo


def names_of(folder: Path, scan: Callable[[Path], Names]) -> Names:
    """What the modules in `folder` export: as it was kept for this very folder, else what `scan` finds.

    Kept only of installed packages, whose files nobody edits; installing another version makes another folder.
    """
    if not {"site-packages", "dist-packages"} & set(folder.parts):
        return scan(folder)
    status = folder.stat()
    mark = [str(folder), status.st_ino, status.st_mtime_ns]
    try:
        path = cache_directory() / "transformers.json"
    except CheckpointError:  # a user without a home
        return scan(folder)
    with suppress(OSError, ValueError, TypeError, LookupError):
        kept = json.loads(path.read_bytes())
        if kept["mark"] == mark:
            return dict(_unpacked(kept["names"]))
    names = scan(folder)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"mark": mark, "names": _packed(names)})
    return names


def _packed(part: Any) -> Any:
    """For JSON, which has no sets, and only text for keys: pairs instead of a mapping, {"": [...]} instead of a set."""
    if isinstance(part, Mapping):
        return [[key if isinstance(key, str) else sorted(key), _packed(value)] for key, value in part.items()]
    return {"": sorted(part)}


def _unpacked(part: Any) -> Any:
    if isinstance(part, list):
        return {key if isinstance(key, str) else frozenset(key): _unpacked(value) for key, value in part}
    return set(part[""])
