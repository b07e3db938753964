"""What a command imports before it is of use, and what is looked through for garbage meanwhile."""

from __future__ import annotations

import gc
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from transformers.utils import import_utils

from petals.cli.imports import importing
from petals.models.source.library import Names, names_of

SERVING = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from petals.models.source.library import import_models
import_models()
from petals.peer.node import open_peer
"""


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_nothing_is_collected_while_modules_are_imported(thawed: None) -> None:
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
        assert gc.get_freeze_count() == before
    assert gc.isenabled()
    assert gc.get_freeze_count() > before  # what was imported is not looked through again


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_frames_tell_their_modules_only_while_modules_are_imported(thawed: None) -> None:
    original = inspect.getmodule
    with importing():
        assert inspect.getmodule is not original
        assert inspect.getmodule(inspect.currentframe()) is sys.modules[__name__]
        assert inspect.getmodule(importing) is sys.modules[importing.__module__]
    assert inspect.getmodule is original


def test_real_paths_are_not_asked_for_while_torch_is_imported() -> None:
    probe = (
        "import os, os.path\n"
        "from petals.cli.imports import importing\n"
        "asked, real = [], os.path.realpath\n"
        "os.path.realpath = lambda path, **others: asked.append(path) or real(path, **others)\n"
        "with importing():\n"
        "    import torch\n"
        "print(len(asked))"
    )
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 100  # 1,800 otherwise


def read_sources(cache: Path) -> list[str]:
    """Import everything that serves; which of the library's models had their sources read."""
    probe = SERVING + "print(*(name for name in opened if '/transformers/models/xl' in name and name.endswith('.py')))"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PETALS_CACHE": str(cache)},
    )
    return sorted(Path(name).name for name in done.stdout.split() if Path(name).name.startswith("modeling_"))


def test_the_sources_of_transformers_are_read_once(tmp_path: Path) -> None:
    cache = tmp_path / "not there yet"
    first = read_sources(cache)
    assert "modeling_xlnet.py" in first
    assert len(first) == len(set(first))
    assert read_sources(cache) == []


def test_a_cache_that_can_not_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert read_sources(tmp_path / "file") != []


def test_the_table_of_lazy_imports_is_the_one_that_transformers_makes_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PETALS_CACHE", str(tmp_path))
    assert transformers.__file__ is not None
    folder = Path(transformers.__file__).parent / "models"
    scan = import_utils.create_import_structure_from_path
    found = scan(folder)
    assert names_of(folder, scan) == found
    assert names_of(folder, no_scan) == found  # as it was kept
    kept = json.loads((tmp_path / "transformers.json").read_bytes())
    assert kept["names"]
    for other in ({**kept, "mark": ["elsewhere", 0, 0]}, {**kept, "names": 7}, {"mark": kept["mark"]}, []):
        (tmp_path / "transformers.json").write_text(json.dumps(other))
        with pytest.raises(Scanned):
            names_of(folder, no_scan)
    (tmp_path / "transformers.json").write_bytes(b"\xff{")
    assert names_of(folder, scan) == found
    assert names_of(folder, no_scan) == found


def test_what_is_not_installed_but_edited_is_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALS_CACHE", str(tmp_path))
    names = {"llama": {frozenset({"torch"}): {"modeling_llama": {"LlamaModel"}}}}
    assert names_of(tmp_path, lambda folder: names) == names
    with pytest.raises(Scanned):
        names_of(tmp_path, no_scan)


class Scanned(Exception):
    pass


def no_scan(folder: Path) -> Names:
    raise Scanned


def test_the_library_is_as_if_it_had_been_imported_alone() -> None:
    probe = SERVING + (
        "import transformers.models\n"
        "from transformers.utils import import_utils\n"
        "assert transformers.models.LlamaConfig is transformers.LlamaConfig\n"
        "assert import_utils.create_import_structure_from_path.cache_info\n"
        "assert not any(type(finder).__module__.startswith('petals') for finder in sys.meta_path)\n"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_a_serving_peer_imports_nothing_that_only_others_need() -> None:
    unneeded = {
        "bitsandbytes",
        "peft",
        "scipy",
        "sklearn",
        "pandas",
        "matplotlib",
        "torchvision",
        "starlette",
        "hypercorn",
    }
    probe = f"{SERVING}print(*({unneeded} & {{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
