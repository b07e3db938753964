"""transformers' own start, made shorter."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PREFIX = "models."


def import_models() -> None:
    """Import `transformers.models`, without reading its sources twice.

    Symptom (transformers 5.23): for the table of its lazy imports the library reads all 2,500 source files of its
    models, 0.2 s, in `transformers/__init__.py`; and then in `transformers/models/__init__.py` again, for the same
    table without the prefix "models.". It remembers tables by the arguments, which differ. Here the second one is made
    of the first; the library's function is its own again afterwards.
    """
    if "transformers.models" in sys.modules:
        return
    import transformers
    from transformers.utils import import_utils

    scan = import_utils.define_import_structure
    folder = Path(transformers.__file__).parent / "models"

    def remembered(path: str, prefix: str | None = None) -> Mapping[Any, Any]:
        if prefix is None and Path(path).parent == folder:
            return without_prefix(scan(folder, prefix=PREFIX[:-1]))
        return scan(path, prefix)

    import_utils.define_import_structure = remembered  # type: ignore[assignment]
    try:
        import transformers.models
    finally:
        import_utils.define_import_structure = scan


def without_prefix(table: Mapping[Any, Mapping[str, Any]]) -> Mapping[Any, Mapping[str, Any]]:
    """The table as seen from `transformers.models`; what else `transformers` wrote into it is left out."""
    return {
        backends: {name.removeprefix(PREFIX): objects for name, objects in modules.items() if name.startswith(PREFIX)}
        for backends, modules in table.items()
    }
